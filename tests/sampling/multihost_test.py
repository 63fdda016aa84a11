"""Two processes share the work and write the same clips as one."""

import json
import os
import pathlib
import subprocess
import sys

import cluster
import numpy as np
import pytest

from sage_grpo_jax.data import media

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import json, pathlib, runpy, sys
import jax
count, index, port, prompts, out = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
from sage_grpo_jax.data import media
from sage_grpo_jax.sampling import run, sources
from sage_grpo_jax.config import builder
recipe = runpy.run_path("configs/moving_shapes.py")["get_config"]()
recipe.mesh.data, recipe.eval.num_steps = int(count), 2
written, write = [], media.write_clip
media.write_clip = lambda path, *rest: (written.append(path.name), write(path, *rest))
request = run.Request(
    sources.Source(), prompts, pathlib.Path(out), overrides={"format": "gif"}, batch_size=2
)
made = run.sample(builder.from_config_dict(recipe), request)
again = run.sample(builder.from_config_dict(recipe), request)
print(json.dumps([made, again, written]))
"""


def _run(count: int, prompts: pathlib.Path, out: pathlib.Path) -> list[list]:
    """What each of `count` processes printed."""
    port = cluster.free_port()
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, (count, i, port, prompts, out))],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disk\na blue square\na green triangle\n")
    ((made, again, everything),) = _run(1, prompts, tmp_path / "one")
    assert (made, again, len(everything)) == (3, 0, 3)
    shares = _run(2, prompts, tmp_path / "two")
    assert [(made, again) for made, again, _ in shares] == [(3, 0), (3, 0)]
    names = [written for *_, written in shares]
    assert all(names)
    assert sorted(names[0] + names[1]) == sorted(everything)
    for name in everything:
        one, two = (media.read_clip(tmp_path / d / name).astype(int) for d in ("one", "two"))
        assert np.abs(one - two).mean() < 0.5
    records = [(tmp_path / d / "samples.jsonl").read_text() for d in ("one", "two")]
    assert records[0] == records[1]
