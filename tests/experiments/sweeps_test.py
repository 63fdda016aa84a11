"""Points of a sweep, their folders, and what the report makes of finished runs."""

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from entry_process import run_all
from PIL import Image

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.experiments import run_report, sweep_report, sweeps

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "sweeps" / "eta_kl.py"


def test_product_and_zipped():
    axes = {"a": [1, 2], "b": ["x", "y"]}
    assert list(sweeps.product(axes)) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert list(sweeps.zipped(axes)) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    with pytest.raises(ValueError, match="lengths"):
        list(sweeps.zipped({"a": [1], "b": [1, 2]}))


def read(path, workdir) -> list[sweeps.Point]:
    return sweeps.read_points(str(path), sweeps.load_module(path).get_config(None), workdir)


def test_the_eta_kl_sweep_is_valid_point_by_point(tmp_path):
    points = read(RECIPE, tmp_path)
    assert len(points) == 45
    assert len({p.folder for p in points}) == 45
    assert {p.config.rollout.eta for p in points} == {0.3, 0.5, 0.7}
    assert {p.config.seed for p in points} == {0, 1, 2}
    assert points[3].config.trust_region.kind == "moving"
    assert all(p.status == "new" for p in points)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("", "has no function sweep"),
        ("def sweep(add): pass", "adds no point"),
        ("def sweep(add):\n  add({'seed': 1}); add({'seed': 1})", "adds a point twice"),
        ("def sweep(add): add({'rollout.eta': -1.0})", "point 0 .*config.rollout.eta: got -1.0"),
        ("def sweep(add): add({'rollout.etta': 1.0})", "point 0 .*etta"),
        ("def sweep(add): add({'method': 'cps'})", "point 0 .*config.method: got 'cps', .*=cps"),
        ("def sweep(add): add({'rollout.num_steps': 1})", "point 0 .*no stochastic step"),
        ("def sweep(add): add({}); add(5)", r"bad.py failed: point 1: add got 5; allowed: "),
        ("def sweep(add): add({3: 1})", r"point 0: add got {3: 1}; allowed: "),
        ("def sweep(add): add({'seed': [1]})", r"point 0: seed is \[1\]; allowed: "),
        ("def sweep(add): add({'seed': np.arange(2)})", "point 0: seed is array"),
        ("sweep = 3", "has no function sweep"),
        ("def sweep(): pass", "bad.py failed: TypeError: sweep"),
        ("def sweep(add): add({'seed': 1}); {}['x']", "bad.py failed: KeyError: 'x'"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(body, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        read(recipe(tmp_path, "bad.py", body), tmp_path)


def recipe(folder: pathlib.Path, name: str, body: str) -> pathlib.Path:
    """A config file of the small world with a `sweep`."""
    file = folder / name
    file.write_text(
        "import numpy as np\n"
        "from sage_grpo_jax.experiments import sweeps\n"
        f"base = sweeps.load_module({str(ROOT / 'configs' / 'moving_shapes.py')!r})\n"
        "get_config = base.get_config\n" + body
    )
    return file


def test_points_may_hold_numbers_of_numpy(tmp_path):
    body = (
        "def sweep(add):\n"
        "  for i in np.arange(2):\n"
        "    add({'seed': i, 'rollout.eta': np.float32(0.25), 'loss.equalizer': np.bool_(False)})"
    )
    points = read(recipe(tmp_path, "numbers.py", body), tmp_path)
    plain = {"seed": 1, "rollout.eta": 0.25, "loss.equalizer": False}
    assert points[1].overrides == plain
    assert [type(value) for value in points[1].overrides.values()] == [int, float, bool]
    assert (points[1].config.seed, points[1].config.rollout.eta) == (1, 0.25)
    sweeps.write_index("numbers.py", points, tmp_path)
    assert json.loads((tmp_path / sweeps.SWEEP_FILE).read_text())["points"][1]["overrides"] == plain


def test_a_point_is_finished_when_its_run_has_all_steps(tmp_path):
    file = recipe(tmp_path, "two.py", "def sweep(add): add({'num_steps': 12})")
    (point,) = read(file, tmp_path)
    assert point.status == "new"
    finished_run(point.folder, 0.1, 0, steps=12)
    assert point.status == "finished"
    longer = dataclasses.replace(point, config=dataclasses.replace(point.config, num_steps=40))
    assert (longer.status, longer.summary) == ("started", None)
    shorter = dataclasses.replace(point, config=dataclasses.replace(point.config, num_steps=6))
    assert shorter.status == "finished"


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": "x"}', "[" * 100_000])
def test_a_damaged_summary_is_named(text, tmp_path):
    (point,) = read(recipe(tmp_path, "one.py", "def sweep(add): add({'seed': 3})"), tmp_path)
    finished_run(point.folder, 0.1, 3)
    (point.folder / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(point.folder / "summary.json"))):
        _ = point.status


def test_transformer_passes_are_counted():
    config = schema.default_config()
    config.rollout.update(num_steps=10, guidance=3.0, prompts_per_step=2, group_size=4)
    config.rollout.update(window="first_k", window_size=4)
    config.loss.micro_batch = config.rollout.decode_batch = 8
    config.trust_region.kind = "dual"
    passes = sweeps.forward_passes(builder.from_config_dict(config))
    # 8 samples, 2 branches; forward and backward (3) and two references on 4 steps.
    assert passes == (8 * 10 * 2, 8 * 4 * 2 * 5)


@pytest.mark.parametrize(
    ("changes", "entries"),
    [
        # 8 samples at 9 steps; forward and backward (3) of each branch, and references.
        ({}, 9 * 2 * 5),
        ({"loss.guidance_gradient": "condition"}, 9 * (2 * 3 + 2)),
        ({"rollout.guidance": 1.0, "trust_region.kind": "none"}, 9 * 3),
        ({"rollout.trained_fraction": 0.5, "rollout.trained_choice": "random"}, 4 * 2 * 5),
        # All samples for the means, then each in its own update: once, and half of them again.
        ({"loss.updates_per_rollout": 2, "loss.split_updates": True}, 9 * 2 * 5 * 1.5),
        ({"loss.updates_per_rollout": 2}, 9 * 2 * 5 * 2),
        # Every noise level, the policy that samples (1), no more for the second update.
        (
            {
                "loss.objective": "nft",
                "loss.equalizer": False,
                "trust_region.kind": "fixed",
                "loss.updates_per_rollout": 2,
                "loss.split_updates": True,
            },
            10 * 2 * (3 + 1 + 1),
        ),
    ],
)
def test_what_the_baselines_cost(changes, entries):
    config = schema.default_config()
    config.rollout.update(num_steps=10, guidance=3.0, prompts_per_step=2, group_size=4)
    config.rollout.decode_batch = 8
    config.loss.micro_batch = 4
    config.update_from_flattened_dict(changes)
    _, update = sweeps.forward_passes(builder.from_config_dict(config))
    assert update == 8 * entries


def finished_run(folder: pathlib.Path, gain: float, seed: int, steps: int = 90) -> None:
    """What a run leaves behind, with a reward that rises by `gain`."""
    folder.mkdir(parents=True)
    rows = [{"step": s, "reward/overall": gain * s / 20 + 0.01 * seed} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric = {"eval/reward/overall": 0.5, "eval/manifold_distance": 0.04}
    last = {"eval/reward/overall": 0.5 + gain, "eval/manifold_distance": 0.03}
    summary = {"name": "n", "method": "sage", "seed": seed, "steps": steps,
               "eval": {"first": metric, "last": last}, "time": {"time/step": 60.0}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def swept(tmp_path) -> pathlib.Path:
    """A sweep with one of its runs missing."""
    points = read(RECIPE, tmp_path)
    sweeps.write_index(str(RECIPE), points, tmp_path)
    for point in points[:-1]:
        eta, region = point.config.rollout.eta, point.config.trust_region
        gain = eta + (0.1 if region.kind == "dual" else 0) + 0.01 * (point.config.seed - 1)
        finished_run(point.folder, gain, point.config.seed)
    return tmp_path


def test_the_report_gathers_means_and_errors_over_seeds(swept):
    runs, points = sweep_report.read_sweep(swept)
    assert (len(runs), points) == (44, 45)
    groups = sweep_report.by_setting(runs)
    assert len(groups) == 15
    key = (0.5, "dual", 1e-3, 30.0)
    assert sweep_report.varying(runs) == [
        "rollout.eta", "trust_region.kind", "trust_region.min_weight", "trust_region.max_weight",
    ]  # fmt: skip
    gains = [run.gain for run in groups[key]]
    assert np.mean(gains) == pytest.approx(0.6)
    assert run_report.standard_error(gains) == pytest.approx(0.01 / np.sqrt(3))
    lines = sweep_report.table(runs, points).splitlines()
    assert lines[0] == "44 of 45 runs finished."
    assert "| 0.7 | dual |" in lines[4]
    assert "| +0.800 ± 0.006 | -25.0 % | 3 |" in lines[4]


def test_the_csv_has_one_row_a_run(swept):
    runs, _ = sweep_report.read_sweep(swept)
    rows = list(csv.DictReader(io.StringIO(sweep_report.to_csv(runs))))
    assert len(rows) == 44
    assert float(rows[0]["rollout.eta"]) == 0.3
    assert float(rows[0]["eval/reward/overall change"]) == pytest.approx(0.29)
    assert float(rows[0]["seconds"]) == 60


def change_summary(point_folder: pathlib.Path, **changes) -> None:
    path = point_folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_runs_without_a_value_leave_the_others_in_the_table(swept, tmp_path):
    folders = [path.parent for path in sorted(swept.glob("runs/*/summary.json"))]
    none = {"eval/reward/overall": None, "eval/reward/vq": None}
    change_summary(folders[0], eval={"first": {"eval/reward/overall": 0.5}, "last": none})
    for folder in folders[3:6]:  # all seeds of a setting
        change_summary(folder, eval={})
    change_summary(folders[6], time={"time/step": None})
    for folder in folders[7:9]:  # one seed is left
        (folder / "summary.json").unlink()
    runs, points = sweep_report.read_sweep(swept)
    assert [run.gain for run in runs[3:6]] == [None] * 3
    cells = [
        [cell.strip() for cell in line.split("|")[5:8]]
        for line in sweep_report.write(runs, points, tmp_path).splitlines()[4:]
    ]
    # Gains of eta 0.3: 0.3 + 0.01 (seed - 1), and 0.1 more with a dual trust region.
    assert ["+0.305 ± 0.005", "-25.0 %", "2 of 3"] in cells
    assert cells[-1] == ["–", "–", "0 of 3"]
    assert ["+0.390", "-25.0 %", "1"] in cells
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert (rows[0]["eval/reward/overall first"], rows[0]["eval/reward/overall last"]) == (
        "0.5",
        "",
    )
    assert (rows[3]["eval/reward/overall change"], rows[6]["seconds"]) == ("", "")
    assert np.asarray(Image.open(tmp_path / "heat_map.png")).std() > 5


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"points": [{"folder": 3}]}', '{"points": 1}'])
def test_a_damaged_sweep_file_is_named(text, tmp_path):
    path = tmp_path / sweeps.SWEEP_FILE
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^--runs: {re.escape(str(path))} ") as error:
        sweep_report.read_sweep(tmp_path)
    assert "allowed: " in str(error.value)


def test_report_and_plan_from_the_command_line(swept):
    out = swept / "report"
    result, plan = run_all(
        [
            ["report", f"--runs={swept}", f"--out={out}"],
            ["sweep", f"--config={RECIPE}", f"--workdir={swept}", "--plan"],
        ],
        ROOT,
    )
    assert (result.status, plan.status) == (0, 0), (result, plan)
    assert "44 of 45 runs finished." in result.stdout
    assert (out / "sweep.md").read_text().strip() in result.stdout
    for name in ("heat_map.png", "curves.png"):
        assert np.asarray(Image.open(out / name)).std() > 5
    assert "45 points, 44 finished; left: 1 runs, 90 steps" in plan.stdout
    # All finished runs took a minute; the last has as many references as the average one or more.
    assert "at the speed of the finished runs: 1:" in plan.stdout


@pytest.mark.slow
def test_a_sweep_runs_and_resumes(tiny_overrides, tmp_path, monkeypatch):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from sage_grpo_jax.experiments import sweeps\n"
        f"base = sweeps.load_module({str(ROOT / 'configs' / 'moving_shapes.py')!r})\n"
        "get_config = base.get_config\n"
        "def sweep(add):\n"
        "  for point in sweeps.product({'rollout.eta': [0.3, 0.5]}): add(point)\n"
    )
    flags = [f"--config.{name}={value}" for name, value in tiny_overrides.items()]
    command = [sys.executable, "-m", "sage_grpo_jax.sweep", f"--config={file}",
               f"--workdir={tmp_path / 'sweep'}", *flags]  # fmt: skip
    devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", devices)
    subprocess.run([*command, "--index=1"], check=True, cwd=ROOT)
    points = read_back(tmp_path / "sweep")
    assert [p.exists() for p in points] == [False, True]
    stamp = (points[1] / "summary.json").stat().st_mtime_ns
    subprocess.run(command, check=True, cwd=ROOT)
    assert (points[0] / "summary.json").exists()
    assert (points[1] / "summary.json").stat().st_mtime_ns == stamp
    assert json.loads((points[0] / "config.json").read_text())["rollout"]["eta"] == 0.3


def read_back(workdir: pathlib.Path) -> list[pathlib.Path]:
    index = json.loads((workdir / sweeps.SWEEP_FILE).read_text())
    return [workdir / p["folder"] for p in index["points"]]
