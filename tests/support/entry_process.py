"""Runs many commands whole, one after another: a process that has imported them forks for each.

Importing takes seconds, a mistake in the flags milliseconds, so one such process serves all tests.
As a script it reads lines, each a JSON list of a folder and commands [entry, flags...], and answers
each with a line: the JSON list of their results.
"""

import atexit
import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from typing import NamedTuple

ENTRIES = (
    "convert",
    "encode_prompts",
    "evaluate",
    "pretrain",
    "report",
    "sample",
    "schedule",
    "serve_rewards",
    "sweep",
    "train",
)
LIMIT_SECONDS = 600
# Only what no entry defines flags in.
_HEAVY = (
    "sage_grpo_jax.rewards.server",
    "sage_grpo_jax.sampling.run",
    "sage_grpo_jax.training.loop",
    "sage_grpo_jax.pretraining.run",
    "sage_grpo_jax.experiments.sweep_report",
    "sage_grpo_jax.weights.conversion",
)


class Result(NamedTuple):
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


FULL = "full disk"  # before a command: no file may grow over LIMIT_BYTES, as on a disk that fills
LIMIT_BYTES = 4096


def run_all(commands: list[list[str]], folder: pathlib.Path) -> list[Result]:
    """The results of the commands, `[entry, flag, ...]` each, run in `folder`."""
    server = _server()
    server.stdin.write(json.dumps([str(folder), commands]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that runs commands has died"
    return [Result(*values) for values in json.loads(answer)]


@functools.cache
def _server() -> subprocess.Popen:
    """The process that has imported the commands; it ends when nobody can write to it any more."""
    line = [sys.executable, __file__]
    server = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end() -> None:
        server.stdin.close()
        server.wait()
        server.stdout.close()

    atexit.register(end)
    return server


def _run(folder: str, entry: str, *flags: str) -> Result:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            _become(entry, flags)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return Result(os.waitstatus_to_exitcode(status), *texts)


def _become(entry: str, flags: tuple[str, ...]) -> None:
    """Never returns."""
    import resource
    import signal
    import traceback

    signal.alarm(LIMIT_SECONDS)  # a mistake that is not refused may train for minutes
    if entry == FULL:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
        entry, *flags = flags
    sys.argv = [entry, *flags]
    status = 0
    try:
        runpy.run_module(f"sage_grpo_jax.{entry}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    import gc
    import importlib

    for name in _HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported stays; nobody need look through it, nor copy its pages
    for line in sys.stdin:
        folder, commands = json.loads(line)
        print(json.dumps([_run(folder, *command) for command in commands]), flush=True)
