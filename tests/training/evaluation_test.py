"""What an evaluation measures, against numpy; the report of a run."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from sage_grpo_jax.experiments import run_report
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.training import evaluation, scoring


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

    # The rewards of the samples tell the change of every prompt: 0.5 and 0.1, ± 0.2.
    for step, rewards in ((0, [0.0, 0.0, 1.0, 3.0]), (2, [0.4, 0.6, 1.1, None])):
        samples = {"VQ": rewards, "TA": [1.0, 1.0, 2.0, 0.0]}
        path = runs[0].workdir / "samples" / f"step_{step:06d}.json"
        path.write_text(json.dumps({"prompts": ["a", "a", "b", "c"], "rewards": samples}))
    assert runs[0].gain_error() == pytest.approx(0.2)
    assert "+1.0 standard errors" in run_report.table(runs[0])

    run_report.write_curve(runs, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 800
    run_report.write_before_after(runs[0], tmp_path)
    both = np.asarray(Image.open(tmp_path / "before_after.png"))
    assert (both[22, 5] == (0, 0, 0)).all()
    assert (both[22, 5 + 36] == (200, 0, 0)).all()
    assert Image.open(tmp_path / "before_after.gif").n_frames == 2


def test_reports_show_whatever_rewards_a_run_has(tmp_path):
    """Those that are monitored only among them, which have no part in the overall reward."""
    _write_run(tmp_path / "run", 0, 0.5, 0.6)
    both = {"eval/reward/overall": 0.5, "eval/reward/zoom": 1.0, "eval/reward/hps_v2": -2.0}
    after = {"eval/reward/overall": 0.9, "eval/reward/zoom": 1.5, "eval/reward/hps_v2": -1.0}
    after["eval/reward/zoom_standard_error"] = 0.1
    _change_summary(tmp_path / "run", eval={"first": both, "last": after})
    rows = [{"step": step, "reward/hps_v2": 0.1, "reward/zoom": 0.2} for step in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    for step, zoom in ((0, [0.0, 1.0]), (2, [1.0, 3.0])):
        table = {
            "prompts": ["a", "b"],
            "rewards": {"zoom": zoom, "hps_v2": [None, 7.0 * step]},
            "optimised": ["zoom"],
        }
        path = tmp_path / "run" / "samples" / f"step_{step:06d}.json"
        path.write_text(json.dumps(table))

    run = run_report.read_run(tmp_path / "run")
    lines = run_report.table(run).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["reward", "overall", "0.5000", "0.9000", "+0.4000"],
        ["reward", "zoom", "1.0000", "1.5000", "+0.5000"],
        ["reward", "hps_v2", "-2.0000", "-1.0000", "+1.0000"],
    ]
    assert "standard_error" not in "".join(lines)
    assert run.rewards == ("hps_v2", "zoom")
    assert run.gain_error() == pytest.approx(0.5)  # of 1 and 2, zoom alone
    run_report.write_curve([run], tmp_path / "curve.png")


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
    assert lines[:2] == [f"| {seed} |" + 9 * " – |" for seed in (0, 1)]
    # One gain is left: no standard error over seeds.
    assert lines[2:] == [
        "| 2 | 0.500 | 0.600 | +0.100 | +2.0 | 0.0200 | 0.0210 | +5.0 % | – | – |",
        "| mean | | | +0.100 | – | | | +5.0 % | – | – |",
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


class ScriptedLearner:
    """Gives known clips and rewards for whatever it is asked; notes what it was asked."""

    def __init__(self, config, videos, rewards) -> None:
        self.config, self.videos, self.rewards = config, videos, rewards
        self.scoring = self
        self.asked: list[str] = []

    def sample(self, params, batch, keys):
        """The places of the clips stand for their latents."""
        first = len(self.asked)
        self.asked += batch.ids
        return (np.arange(len(batch.ids)) + first) % len(self.videos)

    def decode(self, latents):
        """The clips at these places."""
        return self.videos[latents]

    def score_videos(self, videos, batch, name):
        """The rewards of these clips; NaN is a failure."""
        rows = (np.arange(len(batch.ids)) + len(self.asked) - len(batch.ids)) % len(self.videos)
        values = {name: column[rows] for name, column in self.rewards.items()}
        return scoring.Scores(values, np.isfinite(sum(values.values())))


def test_errors_are_over_prompts_and_diversity_within_them(make_config):
    config = make_config({"eval.samples_per_prompt": 3})
    rng = np.random.default_rng(4)
    videos = rng.integers(0, 256, (9, 5, 32, 32, 3), np.uint8)
    videos[3:6] = videos[3]  # the second prompt has collapsed
    rewards = {n: rng.normal(size=9).astype(np.float32) for n in ("VQ", "MQ", "TA")}
    for column in rewards.values():
        column[[1, 6, 7, 8]] = np.nan  # nothing is known of the third prompt
    text = np.zeros((9, 2, 8), np.float32)
    ids = ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    batch = conditions.PromptBatch(ids, ids, text, np.ones((9, 2), bool))
    learner = ScriptedLearner(config, videos, rewards)
    found = evaluation.evaluate(learner, None, batch, "test").metrics
    assert set(found) == {name for name in found if name.startswith("test/")}

    overall = sum(column.astype(np.float64) for column in rewards.values())
    means = [np.mean(overall[[0, 2]]), np.mean(overall[3:6])]
    assert found["test/reward/overall"] == pytest.approx(np.nanmean(overall))
    error = abs(means[0] - means[1]) / 2  # of two values
    assert found["test/reward/overall_standard_error"] == pytest.approx(error, rel=1e-5)
    for name, column in rewards.items():
        means = [np.mean(column[[0, 2]]), np.mean(column[3:6])]
        error = found[f"test/reward/{name.lower()}_standard_error"]
        assert error == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-4)
    pixels = videos.astype(np.float64) / 255
    distances = [
        np.sqrt(np.mean((pixels[i] - pixels[j]) ** 2))
        for first in (0, 3, 6)
        for i, j in itertools.combinations(range(first, first + 3), 2)
    ]
    assert found["test/diversity"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert np.mean(distances[3:6]) == 0
