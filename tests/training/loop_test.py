"""The whole command in a process of its own: finish, kill, terminate, lose the sidecar."""

import json
import os
import pathlib
import signal
import sys
import time

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
    assert process.wait(timeout=600) == 0
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

    # The test prompts are sampled before and after, and at no step in between.
    tested = [row["step"] for row in rows(straight) if "test/reward/overall" in row]
    assert tested == [0, TOTAL_STEPS]
    assert first["test"] == second["test"]
    assert first["test"]["last"] == {
        name: value for name, value in rows(straight)[-1].items() if name.startswith("test/")
    }

    for name in ("step_000000", f"step_{TOTAL_STEPS:06d}", f"test_step_{TOTAL_STEPS:06d}"):
        assert (straight / "samples" / f"{name}.png").stat().st_size > 0
        assert (straight / "samples" / f"{name}.gif").read_bytes()[:6] == b"GIF89a"


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
    assert process.wait(timeout=600) == 2
    lines = workdir.with_suffix(".log").read_text().strip().splitlines()
    assert lines[-1] == "error: config.video.frames: got 6; allowed: 1 + a multiple of 4"
    assert not workdir.exists()
