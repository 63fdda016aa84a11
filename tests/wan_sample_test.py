"""`encode_prompts`, then `sample`, with a second model: from texts to clips as in WanPipeline."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import wan_pair
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from entry_modules import run_entry
from transformers import AutoTokenizer, UMT5EncoderModel

from sage_grpo_jax.data import media
from sage_grpo_jax.flow import noise
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import sampler

sys.path.insert(0, str(pathlib.Path(__file__).parent / "text_encoders"))
import tiny_models

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS = {"cat": "a cat walks on the grass", "dog": "a  red   dog "}
NEGATIVE = "worst quality, still"
STEPS, GUIDANCE, SHIFT, SEED = 4, 3.5, 2.0, 7
# A GIF keeps 256 colours without loss, as many as a frame has pixels.
FRAMES, SIDE, LATENTS = 5, 16, (3, 8, 8, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A whole pipeline of small random models, in folders that diffusers wrote."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_models.build_wan_pipeline(folder)
    transformer = dataclasses.replace(wan_pair.TRANSFORMER, text_dim=tiny_models.TEXT_DIM)
    return wan_pair.make_pair(folder, transformer=transformer).path


@pytest.fixture(scope="module")
def expected(folder) -> list[np.ndarray]:
    """The clips of diffusers, uint8 [F, H, W, 3], from the texts and the initial noise."""
    pipeline = WanPipeline(
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        AutoencoderKLWan.from_pretrained(folder / "vae"),
        wan_pair.Euler(shift=SHIFT),
        WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    keys = jax.random.wrap_key_data(sampler.key_data([SEED] * len(PROMPTS), list(PROMPTS)))
    initial = np.array(noise.initial_noise(keys, LATENTS))
    videos = pipeline(
        prompt=list(PROMPTS.values()),
        negative_prompt=NEGATIVE,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.tensor(initial).permute(0, 4, 1, 2, 3),
        output_type="np",
    ).frames
    return list(np.round(videos * 255).astype(np.uint8))


def start(name: str, *arguments: str) -> None:
    """The entry in a process of its own, on one device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    subprocess.run(
        [sys.executable, "-m", f"sage_grpo_jax.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
    )


@pytest.fixture
def in_process(monkeypatch):
    """The entry in this process, likewise on one device."""
    make, one = mesh_lib.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda **given: make(**{**given, "devices": one}))
    return run_entry


@pytest.mark.parametrize("run", ["in_process", pytest.param("subprocess", marks=pytest.mark.slow)])
def test_clips_are_those_of_the_pipeline_of_diffusers(folder, expected, tmp_path, request, run):
    run = start if run == "subprocess" else request.getfixturevalue(run)
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": name, "prompt": text}) for name, text in PROMPTS.items()]
    prompts.write_text("\n".join(lines) + "\n")
    run(
        "encode_prompts",
        f"--prompts={prompts}",
        f"--text_encoder={folder}",
        f"--out={tmp_path / 'cache'}",
        f"--negative_prompt={NEGATIVE}",
        "--dtype=float32",
        "--device=cpu",
    )
    run(
        "sample",
        f"--config={ROOT / 'configs' / 'wan_21.py'}:variant=1.3B,size={SIDE}x{SIDE}",
        "--config.model.variant=",  # no released one
        f"--config.model.vae={folder / 'vae'}",
        "--config.model.compute_dtype=float32",
        f"--weights={folder / 'transformer'}",
        f"--prompts={tmp_path / 'cache'}",
        f"--out={tmp_path / 'clips'}",
        f"--seeds={SEED}",
        f"--frames={FRAMES}",
        f"--steps={STEPS}",
        f"--guidance={GUIDANCE}",
        f"--shift={SHIFT}",
        "--format=gif",
        "--batch_size=2",
    )
    for number, (name, want) in enumerate(zip(PROMPTS, expected, strict=True)):
        clip = media.read_clip(tmp_path / "clips" / f"{number:03d}_{name}_seed{SEED}.gif")
        assert clip.shape == want.shape == (FRAMES, SIDE, SIDE, 3)
        assert want.std() > 5
        # A value may lie on the border between two levels.
        assert np.abs(clip.astype(int) - want).max() <= 1
        assert np.mean(clip != want) < 1e-3
    assert np.abs(expected[0].astype(int) - expected[1]).max() > 5
