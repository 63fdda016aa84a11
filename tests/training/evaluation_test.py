"""The report of a run."""

import json

import numpy as np
import pytest
from PIL import Image

from sage_grpo_jax.training import run_report


def _write_run(folder, seed: int, before: float, after: float):
    first = {"eval/reward/overall": before, "eval/reward/overall_standard_error": 0.03}
    last = {"eval/reward/overall": after, "eval/reward/overall_standard_error": 0.04}
    for values, distance in ((first, 0.02), (last, 0.021)):
        values["eval/manifold_distance"] = distance
    rows = [
        {"step": 0, **first},
        {"step": 1, "reward/overall": before, "reward/vq": 0.1, "time/update": 2.0},
        {"step": 2, "reward/overall": after, "reward/vq": 0.2, "time/update": 3.0, **last},
    ]
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "method": "sage",
        "seed": seed,
        "steps": 2,
        "eval": {"first": first, "last": last},
        "time": {"time/update": 5.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    for step in (0, 2):
        picture = Image.new("RGB", (20, 10), (step * 100, 0, 0))
        picture.save(folder / "samples" / f"step_{step:06d}.png")
        other = Image.new("RGB", (20, 10), (0, step * 100, 9))
        picture.save(
            folder / "samples" / f"step_{step:06d}.gif",
            save_all=True,
            append_images=[other],
            duration=120,
        )


def test_report_counts_changes_in_standard_errors(tmp_path):
    changes = (0.2, 0.3, 0.4)
    runs = []
    for seed, change in enumerate(changes):
        _write_run(tmp_path / str(seed), seed, -1.0, -1.0 + change)
        runs.append(run_report.read_run(tmp_path / str(seed)))
    text = run_report.table(runs[0])
    assert "+4.0 standard errors" in text  # 0.2 / hypot(0.03, 0.04)
    assert "update 0:05" in text
    table = run_report.seeds_table(runs)
    # mean 0.3, standard error 0.1 / √3
    assert "+0.300 ± 0.058" in table
    assert "+5.2 (over seeds)" in table
    assert "+5.0 %" in table
    run_report.write_curve(runs, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 800
    run_report.write_before_after(runs[0], tmp_path)
    both = np.asarray(Image.open(tmp_path / "before_after.png"))
    assert (both[22, 5] == (0, 0, 0)).all()
    assert (both[22, 5 + 36] == (200, 0, 0)).all()
    assert Image.open(tmp_path / "before_after.gif").n_frames == 2


def _change_summary(folder, **changes):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_not_measured_is_left_out(tmp_path):
    for seed in range(3):
        _write_run(tmp_path / str(seed), seed, 0.5, 0.6)
    no_reward = {"eval/reward/overall": None, "eval/reward/overall_standard_error": None}
    _change_summary(tmp_path / "0", eval={"first": {}, "last": {}}, time={})
    _change_summary(tmp_path / "1", eval={"first": {"eval/reward/overall": 0.5}, "last": no_reward})
    runs = [run_report.read_run(tmp_path / str(seed)) for seed in range(3)]
    assert run_report.table(runs[0]).startswith("no evaluation before and after has a value\ntime")
    assert "reward overall" not in run_report.table(runs[1])
    lines = run_report.seeds_table(runs).splitlines()[2:]
    assert lines[:2] == [f"| {seed} | – | – | – | – | – | – | – |" for seed in (0, 1)]
    # One gain is left: no standard error over seeds.
    assert lines[2:] == [
        "| 2 | 0.500 | 0.600 | +0.100 | +2.0 | 0.0200 | 0.0210 | +5.0 % |",
        "| mean | | | +0.100 | – | | | +5.0 % |",
    ]
    for picture in (tmp_path / "0" / "samples").iterdir():
        picture.unlink()
    assert not run_report.write_before_after(runs[0], tmp_path)
    assert not list(tmp_path.glob("before_after*"))
    (tmp_path / "0" / "metrics.jsonl").unlink()
    run_report.write_curve([run_report.read_run(tmp_path / "0")], tmp_path / "curve.png")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "summary.json is damaged"),
        ("[]", "summary.json holds a list; allowed: a JSON object"),
        ("[" * 100_000, "summary.json is damaged"),
        ('{"seed": 0, "steps": 1, "eval": {}, "time": {}}', "summary.json: method is missing"),
        (
            '{"method": "sage", "seed": "x", "steps": 1, "eval": {}, "time": {}}',
            "summary.json: seed is 'x'; allowed: the summary of a run",
        ),
        (
            '{"method": "sage", "seed": 0, "steps": 1, "eval": {"last": {"a": "b"}}, "time": {}}',
            "summary.json: eval.last is {'a': 'b'}; allowed: numbers by name",
        ),
    ],
)
def test_a_damaged_summary_is_named(tmp_path, text, expected):
    _write_run(tmp_path / "run", 0, 0.5, 0.6)
    (tmp_path / "run" / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"^--runs: .*" + expected) as error:
        run_report.read_run(tmp_path / "run")
    assert str(tmp_path / "run") in str(error.value)


def test_damaged_metrics_are_named(tmp_path):
    _write_run(tmp_path / "run", 0, 0.5, 0.6)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n{"step": Infinity}\n')
    with pytest.raises(ValueError, match=r"^--runs: .*metrics.jsonl, line 2: "):
        run_report.read_run(tmp_path / "run")


def test_unfinished_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no summary.json"):
        run_report.read_run(tmp_path)
