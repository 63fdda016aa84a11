"""SIGKILL at twenty moments of one run: the same bits at the end, and no sidecar left behind."""

import os
import pathlib
import random
import signal
import sys
import time

import numpy as np
import pytest
from trainer_process import children, finish, rows, saved_arrays, start, wait_for

STEPS = 60
SETTINGS = {"checkpoint.every": 3, "eval.every": 7, "rollout.decode_batch": 8}
# Moments of a life: while it starts, anywhere in its steps (rollout, decoding, accumulation,
# evaluation), while a checkpoint is being written, while rewards are awaited.
MOMENTS = ["start"] * 3 + ["anywhere"] * 9 + ["saving"] * 5 + ["reward"] * 3


def _rows(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saving(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _inode(workdir: pathlib.Path) -> int | None:
    path = workdir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def _live_until(moment, process, workdir: pathlib.Path, inode, rng: random.Random) -> bool:
    """Waits for a moment; whether a checkpoint is half-written then."""
    if moment == "start":
        time.sleep(rng.uniform(0.5, 6.0))
        return False
    # A new life cuts the record back under a new inode, then adds to it.
    wait_for(lambda: _inode(workdir) not in (None, inode), process)
    begun = _rows(workdir)
    wanted = begun + rng.randint(1, 5)
    wait_for(lambda: _rows(workdir) >= wanted, process)
    if moment == "saving":
        wait_for(lambda: _saving(workdir), process)
        time.sleep(rng.uniform(0.0, 0.02))
        return _saving(workdir)
    time.sleep(rng.uniform(0.0, 0.5))
    if moment == "reward":
        (server,) = children(process.pid)
        os.kill(server, signal.SIGSTOP)
        time.sleep(1.0)  # the rollout ends, the answer does not come
        process.kill()
        os.kill(server, signal.SIGCONT)
    return _saving(workdir)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_twenty_kills_leave_the_same_bits(tiny_overrides, tmp_path):
    settings, more = {**tiny_overrides, **SETTINGS}, f"--config.num_steps={STEPS}"
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(start(straight, settings, more), straight)
    rng = random.Random(20)
    moments = rng.sample(MOMENTS, len(MOMENTS))
    killed, half_written, servers = [], 0, set()
    for moment in moments:
        inode = _inode(broken)
        process = start(broken, settings, more)
        half_written += _live_until(moment, process, broken, inode, rng)
        servers |= set(children(process.pid))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        killed.append((moment, _rows(broken) - 1))
    finish(start(broken, settings, more), broken)
    print("killed at:", killed, "checkpoints half-written:", half_written)
    assert half_written >= 1
    assert rows(broken) == rows(straight)
    assert [row["step"] for row in rows(straight)] == list(range(STEPS + 1))
    for a, b in zip(saved_arrays(straight, STEPS), saved_arrays(broken, STEPS), strict=True):
        np.testing.assert_array_equal(a, b)
    time.sleep(2.0)
    assert not [pid for pid in servers if pathlib.Path(f"/proc/{pid}").exists()]
