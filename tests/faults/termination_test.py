"""The real command, killed at any moment: the old result or the new one is there, whole.

A process that has imported the command forks for each run, and sends SIGTERM after a part of the
time that the run takes; in the quick test at a few moments, in the slow one at many.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / "sage_grpo_jax/assets/moving_shapes/transformer"

PROGRAM = """
import importlib, json, os, pathlib, runpy, signal, sys, time
for name in ("sage_grpo_jax.common.command_line", "sage_grpo_jax.weights.conversion",
             "sage_grpo_jax.training.blueprint"):
    importlib.import_module(name)
model, parent, moments = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])

def become(flags):
    sys.argv = ["convert", f"--src={model}", "--src_format=diffusers", *flags]
    os.dup2(os.open(parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    try:
        runpy.run_module("sage_grpo_jax.convert", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(99)

def convert(form, moment):
    child, start = os.fork(), time.monotonic()
    if not child:
        become(["--overwrite", f"--dst={parent / 'out'}", f"--dst_format={form}"])
    if moment is not None:
        time.sleep(moment)
        os.kill(child, signal.SIGTERM)  # a process that has ended stays until it is waited for
        sent = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = sorted(path.name for path in parent.iterdir())
    manifest = json.loads((parent / "out/sage_grpo_jax_manifest.json").read_text())
    return {"status": status, "names": names, "seconds": time.monotonic() - start,
            "holds": manifest["holds"], "text": (parent / "log").read_text(),
            "files": sorted(manifest["files"]), "there": sorted(
                path.relative_to(parent / "out").as_posix()
                for path in (parent / "out").rglob("*") if path.is_file())}

found = [convert("orbax", None)]
for i, moment in enumerate(moments):
    found.append(convert(("diffusers", "orbax")[i % 2], moment * found[0]["seconds"]))
print(json.dumps(found))
"""


def run_killed(tmp_path: pathlib.Path, moments: list[float]) -> list[dict]:
    """How each run ended; the first was left alone."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, MODEL, tmp_path, json.dumps(moments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(found: list[dict]) -> int:
    """That every run left something whole; returns how many the signal has ended."""
    assert found[0]["status"] == 0
    ended = 0
    for before, row in itertools.pairwise(found):
        assert row["names"] == ["log", "out"], row
        assert row["there"] == sorted([*row["files"], "sage_grpo_jax_manifest.json"]), row
        if row["status"] == 0:  # the signal came after the end
            assert row["text"].splitlines()[-1].startswith("done: "), row
        else:
            # 143 by ourselves; -15 by the system, before the first line of the command.
            assert row["status"] in (143, -15), row
            assert "Traceback" not in row["text"], row
            ended += 1
            if "done" not in row["text"] and row["status"] == -15:
                assert row["holds"] == before["holds"]
    return ended


def test_a_few_moments(tmp_path):
    assert check(run_killed(tmp_path, [0.3, 0.55, 0.8])) >= 1


@pytest.mark.slow
def test_many_moments(tmp_path):
    moments = [i / 60 for i in range(66)]
    assert check(run_killed(tmp_path, moments)) >= 30
