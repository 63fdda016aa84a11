"""The whole command in a process of its own: finish, kill, terminate, lose the sidecar."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sage_grpo_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
TOTAL_STEPS = 5


def command(workdir: pathlib.Path, overrides: dict[str, object], *more: str) -> list[str]:
    """The training command of the tiny recipe."""
    flags = [
        f"--config.{name}={value}"
        for name, value in {**overrides, "num_steps": TOTAL_STEPS}.items()
    ]
    return [
        sys.executable,
        "-m",
        "sage_grpo_jax.train",
        f"--config={ROOT}/configs/moving_shapes.py:method=sage",
        f"--workdir={workdir}",
        *flags,
        *more,
    ]


def start(workdir: pathlib.Path, overrides: dict[str, object], *more: str) -> subprocess.Popen:
    """Starts the command; its output goes to a file beside the workdir."""
    # One device is enough here, and starts faster than the eight of the other tests.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = {**os.environ, "XLA_FLAGS": flags}
    log = workdir.with_suffix(".log").open("ab")
    line = command(workdir, overrides, *more)
    return subprocess.Popen(line, env=env, stdout=log, stderr=log, cwd=ROOT)


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Waits for a good end."""
    code = process.wait(timeout=300)
    assert code == 0, workdir.with_suffix(".log").read_text()[-3000:]


def rows(workdir: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl without the seconds."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    """Until the condition holds, with the process alive."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the trainer ended early"
        assert time.monotonic() < deadline, "the trainer is too slow"
        time.sleep(0.02)


def saved_arrays(workdir: pathlib.Path, steps: int = TOTAL_STEPS) -> list[np.ndarray]:
    """Every array of the newest checkpoint's state, in a fixed order."""
    import jax
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer((workdir / checkpoint.FOLDER).absolute()) as checkpointer:
        assert checkpointer.latest.step == steps
        loaded = checkpointer.load_checkpointables(steps, {"state": None})
    return [np.asarray(x) for x in jax.tree.leaves(loaded["state"])]


def test_killed_and_resumed_run_has_the_same_bits(tiny_overrides, tmp_path):
    """SIGKILL in the middle of a step, SIGTERM in another: same parameters, same metrics."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(start(straight, tiny_overrides), straight)

    process = start(broken, tiny_overrides)
    wait_for(lambda: len(rows(broken)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "summary.json").exists()

    process = start(broken, tiny_overrides)
    wait_for(lambda: len(rows(broken)) >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    assert not (broken / "summary.json").exists()
    finish(start(broken, tiny_overrides), broken)

    assert rows(broken) == rows(straight)
    assert [row["step"] for row in rows(straight)] == list(range(TOTAL_STEPS + 1))
    for a, b in zip(saved_arrays(straight), saved_arrays(broken), strict=True):
        np.testing.assert_array_equal(a, b)
    first, second = (json.loads((w / "summary.json").read_text()) for w in (straight, broken))
    assert first["eval"] == second["eval"]
    assert first["steps"] == TOTAL_STEPS
    for name in ("eval/reward/overall", "eval/reward/vq"):
        assert np.isfinite(first["eval"]["last"][name])
    for name in ("step_000000", f"step_{TOTAL_STEPS:06d}"):
        assert (straight / "samples" / f"{name}.png").stat().st_size > 0
        assert (straight / "samples" / f"{name}.gif").read_bytes()[:6] == b"GIF89a"


def children(pid: int) -> list[int]:
    """Process ids of the children that serve rewards."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            serves = b"serve_rewards" in (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and serves and fields[0] != "Z":
            found.append(int(path.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_dead_sidecar_costs_no_rollout_and_leaves_no_orphan(tiny_overrides, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, tiny_overrides)
    wait_for(lambda: len(rows(workdir)) >= 2, process)
    (server,) = children(process.pid)
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: len(rows(workdir)) >= 4, process)
    assert all(row["reward/valid_fraction"] == 1 for row in rows(workdir)[1:])
    (successor,) = children(process.pid)
    assert successor != server
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{successor}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{successor}").exists(), "the sidecar outlived its trainer"


def test_bad_input_ends_with_one_line(tiny_overrides, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, {**tiny_overrides, "video.frames": 6})
    assert process.wait(timeout=120) == 2
    lines = workdir.with_suffix(".log").read_text().strip().splitlines()
    assert lines[-1] == "error: config.video.frames: got 6; allowed: 1 + a multiple of 4"
    assert not workdir.exists()
