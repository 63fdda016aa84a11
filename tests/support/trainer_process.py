"""Starts the training command on the tiny recipe in a process, and looks at what it left."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

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


def start(
    workdir: pathlib.Path,
    overrides: dict[str, object],
    *more: str,
    devices: int = 1,
    suffix: str = ".log",
    **variables: str,
) -> subprocess.Popen:
    """Starts the command; its output goes to a file beside the workdir.

    Args:
      workdir: see `command`, also for `overrides` and `more`.
      devices: one starts faster than the eight of the other tests.
      suffix: of the file.
      variables: of the environment.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    env = {**os.environ, "XLA_FLAGS": flags, **variables}
    log = workdir.with_suffix(suffix).open("ab")
    line = command(workdir, overrides, *more)
    return subprocess.Popen(line, env=env, stdout=log, stderr=log, cwd=ROOT)


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Waits for a good end."""
    code = process.wait(timeout=600)
    assert code == 0, workdir.with_suffix(".log").read_text()[-3000:]


def rows(workdir: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl without the seconds; one that is being written is none yet."""
    path = workdir / "metrics.jsonl"
    *lines, _unfinished = path.read_text().split("\n") if path.exists() else [""]
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
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

    # Onto one device of this process: those that saved may not be here.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer((workdir / checkpoint.FOLDER).absolute()) as checkpointer:
        assert checkpointer.latest.step == steps
        stored = checkpointer.checkpointables_metadata(steps).metadata["state"]
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored
        )
        loaded = checkpointer.load_checkpointables(steps, {"state": wanted})
    return [np.asarray(x) for x in jax.tree.leaves(loaded["state"])]


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
