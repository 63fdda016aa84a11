"""The sampler with a second model against diffusers' whole WanPipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import wan_pair
from diffusers import WanPipeline

from sage_grpo_jax import weights
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import sampler as sampler_lib
from sage_grpo_jax.policy.conditions import PromptBatch
from sage_grpo_jax.policy.policy import Policy
from sage_grpo_jax.sampling.settings import Settings

SETTINGS = Settings(
    sampler="ode",
    steps=6,
    shift=3.0,
    guidance=5.0,
    eta=0.0,
    frames=5,
    height=16,
    width=32,
    fps=16.0,
    tiling="off",
)
LATENTS, TOKENS = (3, 8, 16, 4), 512


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def prompts(seed: int, lengths: list[int]) -> PromptBatch:
    """Random embeddings of the given lengths, padded to 6 tokens with junk under the mask."""
    names = [str(i) for i in range(len(lengths))]
    mask = np.arange(6) < np.array(lengths)[:, None]
    text = draw(seed, len(lengths), 6, wan_pair.TRANSFORMER.text_dim)
    return PromptBatch(names, names, text, mask)


def embeds(batch: PromptBatch, count: int) -> torch.Tensor:
    """As the pipeline makes them: the prompt's own tokens, then zeros."""
    rows = []
    for text, mask in zip(batch.text, batch.mask, strict=True):
        own = text[: mask.sum()]
        rows.append(np.concatenate([own, np.zeros((TOKENS - len(own), text.shape[1]))]))
    return torch.tensor(np.broadcast_to(rows, (count, *rows[0].shape)), dtype=torch.float32)


def of_diffusers(pair, batch, negative, initial) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, T, H, W, C] and uint8 frames of the pipeline."""
    scheduler = wan_pair.Euler(shift=SETTINGS.shift)
    pipeline = WanPipeline(None, None, pair.vae, scheduler, pair.transformer)
    pipeline.set_progress_bar_config(disable=True)
    last = {}

    def keep(pipeline, step, timestep, tensors):
        last.update(tensors)
        return {}

    count = len(batch.ids)
    videos = pipeline(
        prompt_embeds=embeds(batch, count),
        negative_prompt_embeds=embeds(negative, count),
        height=SETTINGS.height,
        width=SETTINGS.width,
        num_frames=SETTINGS.frames,
        num_inference_steps=SETTINGS.steps,
        guidance_scale=SETTINGS.guidance,
        latents=torch.tensor(initial).permute(0, 4, 1, 2, 3),
        callback_on_step_end=keep,
        output_type="np",
    ).frames
    latents = last["latents"].permute(0, 2, 3, 4, 1).numpy()
    return latents, np.round(videos * 255).astype(np.uint8)


def of_ours(folder, batch, negative, initial, tiling="off") -> tuple[np.ndarray, np.ndarray]:
    """The same from the folders that diffusers wrote."""
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    configs = [weights.load_config(folder / name) for name in ("transformer", "vae")]
    params = [
        weights.load(folder / name, config)
        for name, config in zip(("transformer", "vae"), configs, strict=True)
    ]
    sampling = SETTINGS.sampling(configs[1], "highest")
    sampler = sampler_lib.Sampler(*configs, Policy(params[0]), params[1], negative, sampling, mesh)
    with jax.set_mesh(mesh):
        keys = sampler_lib.key_data([0] * len(batch.ids), batch.ids)
        latents = np.asarray(sampler.sample(batch, keys, initial))
        frames = dict(sampler.decode(jnp.asarray(latents)))
    return latents, np.stack([frames[row] for row in range(len(batch.ids))])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return wan_pair.make_pair(tmp_path_factory.mktemp("wan"))


def test_text_to_video_equals_the_pipeline_of_diffusers(pair):
    inputs = prompts(0, [4, 6]), prompts(1, [1]), draw(2, 2, *LATENTS)
    want, want_frames = of_diffusers(pair, *inputs)
    got, frames = of_ours(pair.path, *inputs)
    assert np.abs(want).max() > 1.0
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert want_frames.shape == (2, SETTINGS.frames, SETTINGS.height, SETTINGS.width, 3)
    assert want_frames.std() > 5
    # A value may lie on the border between two levels.
    assert np.abs(frames.astype(int) - want_frames).max() <= 1
    assert np.mean(frames != want_frames) < 1e-3
