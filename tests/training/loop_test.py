"""The whole command in processes of its own: finish, kill, stop, lose the sidecar; many devices."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import cluster
import numpy as np
import pytest
from trainer_process import (
    TOTAL_STEPS,
    children,
    finish,
    rows,
    saved_arrays,
    start,
    wait_for,
)

# Rounding stays rounding: steps of Adam far above its eps follow the sign of tiny gradients.
OVERRIDES = {"optimizer.eps": 1e-4, "optimizer.learning_rate": 1e-4, "eval.every": 2}


@pytest.fixture(scope="module")
def overrides(tiny_overrides):
    return {**tiny_overrides, **OVERRIDES}


@pytest.fixture(scope="module")
def straight(overrides, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run on one device, which nobody has disturbed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(start(workdir, overrides), workdir)
    return workdir


def assert_same_bits(found: pathlib.Path, wanted: pathlib.Path) -> None:
    """The same metrics, parameters and evaluations."""
    assert rows(found) == rows(wanted)
    for a, b in zip(saved_arrays(found), saved_arrays(wanted), strict=True):
        np.testing.assert_array_equal(a, b)

    first, second = (json.loads((w / "summary.json").read_text()) for w in (found, wanted))
    for name in ("eval", "test", "steps"):
        assert first[name] == second[name]


def test_what_a_run_leaves(straight):
    assert [row["step"] for row in rows(straight)] == list(range(TOTAL_STEPS + 1))
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["steps"] == TOTAL_STEPS
    for name in ("eval/reward/overall", "eval/reward/vq"):
        assert np.isfinite(summary["eval"]["last"][name])

    # The test prompts are sampled before and after, and at no step in between.
    tested = [row["step"] for row in rows(straight) if "test/reward/overall" in row]
    assert tested == [0, TOTAL_STEPS]
    assert summary["test"]["last"] == {
        name: value for name, value in rows(straight)[-1].items() if name.startswith("test/")
    }

    for name in ("step_000000", f"step_{TOTAL_STEPS:06d}", f"test_step_{TOTAL_STEPS:06d}"):
        assert (straight / "samples" / f"{name}.png").stat().st_size > 0
        assert (straight / "samples" / f"{name}.gif").read_bytes()[:6] == b"GIF89a"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_dead_sidecar_then_killed_and_resumed(overrides, straight, tmp_path):
    """SIGKILL to the sidecar costs no rollout, to the trainer in the middle of a step no bit."""
    workdir = tmp_path / "run"
    process = start(workdir, overrides)
    wait_for(lambda: len(rows(workdir)) >= 2, process)
    (server,) = children(process.pid)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: len(rows(workdir)) >= 4, process)
    assert all(row["reward/valid_fraction"] == 1 for row in rows(workdir)[1:])
    (successor,) = children(process.pid)
    assert successor != server
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "summary.json").exists()
    deadline = time.monotonic() + 60
    while pathlib.Path(f"/proc/{successor}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{successor}").exists(), "the sidecar outlived its trainer"

    finish(start(workdir, overrides), workdir)
    assert_same_bits(workdir, straight)


# Both signals in one run. Below, SIGTERM reaches a cluster; tests/faults/interruption_test.py sends
# it in every phase.
@pytest.mark.slow
def test_killed_and_stopped_and_resumed(overrides, straight, tmp_path):
    """SIGKILL in the middle of a step, SIGTERM in another: same parameters, same metrics."""
    broken = tmp_path / "broken"
    process = start(broken, overrides)
    wait_for(lambda: len(rows(broken)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "summary.json").exists()

    process = start(broken, overrides)
    wait_for(lambda: len(rows(broken)) >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 0
    assert not (broken / "summary.json").exists()
    finish(start(broken, overrides), broken)
    assert_same_bits(broken, straight)


def start_two(
    workdir: pathlib.Path, overrides: dict[str, object], *more: str
) -> list[subprocess.Popen]:
    """Starts the command in two processes with one device each, on one workdir."""
    together = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{cluster.free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        start(workdir, overrides, *more, suffix=f".{i}.log", **together, JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]


def finish_two(processes: list[subprocess.Popen], workdir: pathlib.Path) -> None:
    """Waits for a good end of both."""
    codes = [process.wait(timeout=600) for process in processes]
    logs = [workdir.with_suffix(f".{i}.log").read_text()[-2000:] for i in range(2)]
    assert codes == [0, 0], logs


def assert_same_run(found: pathlib.Path, wanted: pathlib.Path) -> None:
    """The same metrics and parameters, apart from the order of summation."""
    mine, theirs = rows(found), rows(wanted)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        for name in a:
            if name.startswith(("reward/", "eval/", "grad/", "kl/", "advantage/", "step")):
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), (a["step"], name)
    for a, b in zip(saved_arrays(found), saved_arrays(wanted), strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-3, atol=1e-4)


# The next test has more processes, learner_test.py more devices.
@pytest.mark.slow
def test_four_devices(overrides, straight, tmp_path):
    workdir = tmp_path / "four"
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    finish(start(workdir, overrides, *mesh, devices=4), workdir)
    assert_same_run(workdir, straight)


def test_two_processes_stopped_and_resumed(overrides, straight, tmp_path):
    """A signal to one process stops both after the same step; the same commands go on."""
    workdir = tmp_path / "two"
    mesh = ("--config.mesh.data=2",)
    processes = start_two(workdir, overrides, *mesh)
    wait_for(lambda: len(rows(workdir)) >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    finish_two(processes, workdir)
    assert not (workdir / "summary.json").exists()
    finish_two(start_two(workdir, overrides, *mesh), workdir)
    assert (workdir / "summary.json").exists()
    assert_same_run(workdir, straight)
