"""The command line of `sample`, on the shipped model."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from entry_process import run_all

from sage_grpo_jax.data import media

ROOT = pathlib.Path(__file__).parent.parent


CONFIG = "--config=configs/moving_shapes.py"


def _run(*arguments: str) -> subprocess.CompletedProcess:
    # One device: the recipe's batch goes through it whole.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return subprocess.run(
        [sys.executable, "-m", "sage_grpo_jax.sample", CONFIG, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )


def test_videos_of_the_shipped_model_and_bad_input(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    captions = {"r": "a red disk moves left, fast, over a dark background",
                "b": "a blue square moves right, fast, over a light background"}  # fmt: skip
    prompts.write_text(
        "".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in captions.items())
    )
    good = _run(
        "--weights=asset:moving_shapes/transformer",
        f"--prompts={prompts}",
        f"--out={out}",
        "--sampler=precise",
        "--eta=0.3",
        "--steps=10",
        "--seeds=3",
        "--format=gif",
    )
    flags = [f"--prompts={prompts}", f"--out={tmp_path / 'bad'}", "--height=30"]
    (bad,) = run_all([["sample", CONFIG, *flags]], ROOT)
    assert bad.status == 2
    assert bad.stderr == "error: --height: got 30; allowed: a multiple of 8\n"
    assert not (tmp_path / "bad").exists()

    assert good.returncode == 0, good.stderr
    assert good.stdout == f"done: 2 videos; see {out}\n"
    clips = [media.read_clip(out / f"00{i}_{name}_seed3.gif") for i, name in enumerate(captions)]
    assert all(clip.shape[1:] == (32, 32, 3) for clip in clips)
    # The colours that were asked for, over dark and over light.
    for clip, background, channel in zip(clips, (40, 215), (0, 2), strict=True):
        assert abs(np.median(clip) - background) < 20
        away = np.abs(clip.astype(int) - np.median(clip)).sum(axis=-1)
        shape = clip[away > 0.5 * away.max()].astype(int).mean(axis=0)
        assert shape.argmax() == channel
        assert shape[channel] > shape[[c for c in range(3) if c != channel]].max() + 60
    settings = json.loads((out / "samples.jsonl").read_text().splitlines()[0])["settings"]
    assert (settings["sampler"], settings["eta"], settings["steps"]) == ("precise", 0.3, 10)
