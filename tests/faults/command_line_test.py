"""The real command: bad flags, a full disk, death in the middle of a start."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from trainer_process import ROOT, children, command, finish, rows, saved_arrays, start

CONFIG = f"--config={ROOT}/configs/moving_shapes.py"


def _run(*flags: str) -> subprocess.CompletedProcess:
    """The command, to its end."""
    line = [sys.executable, "-m", "sage_grpo_jax.train", *flags]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([f"{CONFIG}:method=ppo"], "error: method: got 'ppo'; allowed: sage, "),
        pytest.param(
            [CONFIG, "--config.rollout.etaa=1"],
            "error: unknown config field: 'etaa'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [CONFIG, "--config.rollout.group_size=2.5"],
            "error: flag --config.rollout.group_size=2.5: invalid literal for int()",
            marks=pytest.mark.slow,
        ),
        pytest.param([CONFIG, "--nonsense=1"], "error: Unknown", marks=pytest.mark.slow),
        pytest.param(
            ["--config=nowhere.py"], "error: --config: No such file", marks=pytest.mark.slow
        ),
        pytest.param([], "error: --config: missing", marks=pytest.mark.slow),
        pytest.param(
            [CONFIG, "--config.rollout.eta=-1"],
            "error: config.rollout.eta: got -1.0; allowed: 0 to 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_flags_end_with_one_line(tmp_path, flags, expected):
    done = _run(*flags, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kilobytes", "what"), [(16, "the embeddings"), (200, "a checkpoint")])
def test_a_full_disk_ends_the_command_with_one_line(tiny_overrides, tmp_path, kilobytes, what):
    """No file may grow over a limit: the embeddings do not fit, or a checkpoint does not."""
    settings, workdir = dict(tiny_overrides), tmp_path / "run"
    if what == "a checkpoint":
        settings["data.train_prompts"] = tmp_path / "prompts.txt"
        settings["data.eval_prompts"] = tmp_path / "prompts.txt"
        prompt = "a {} red disk moves left, {}, over a dark background\n"
        lines = [prompt.format(a, b) for a in ("small", "large") for b in ("fast", "slowly")]
        (tmp_path / "prompts.txt").write_text("".join(lines))
    limit = f'ulimit -f {kilobytes}; exec "$@"'
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run(
        ["bash", "-c", limit, "-", *command(workdir, settings)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    assert done.returncode == 1, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"stopped: {what} in {workdir} ")
    assert "File too large" in last
    assert "Traceback" not in done.stderr
    assert not list(workdir.rglob("*tmp*"))
    finish(start(workdir, settings), workdir)
    straight = tmp_path / "straight"
    finish(start(straight, settings), straight)
    assert rows(workdir) == rows(straight)
    pairs = zip(saved_arrays(workdir), saved_arrays(straight), strict=True)
    assert all((a == b).all() for a, b in pairs)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_no_sidecar_outlives_a_trainer_that_dies_while_it_starts_one(
    tiny_overrides, tmp_path, number
):
    process = start(tmp_path / "run", tiny_overrides)
    deadline = time.monotonic() + 120
    while not (server := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    process.wait(60)
    deadline = time.monotonic() + 15
    while pathlib.Path(f"/proc/{server[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{server[0]}").exists()
