"""The sampler on Wan 2.1 against diffusers' own WanPipeline, on small random models."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import wan_vae_oracle
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from wan_oracle import TINY, make_oracle

from sage_grpo_jax import weights
from sage_grpo_jax.models.wan_vae import WanVaeConfig
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy.conditions import PromptBatch
from sage_grpo_jax.policy.policy import Policy
from sage_grpo_jax.policy.sampler import Sampler, key_data
from sage_grpo_jax.sampling.settings import Settings

VAE = WanVaeConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.5, 0.7, 1.1, 0.9),
)
SETTINGS = Settings(
    sampler="ode",
    steps=4,
    shift=3.0,
    guidance=5.0,
    eta=0.0,
    frames=5,
    height=16,
    width=32,
    fps=8.0,
    tiling="off",
)
LATENTS = (3, 8, 16, 4)
TOKENS = 512  # that the pipeline fills prompts up to


class Euler(FlowMatchEulerDiscreteScheduler):
    """With the steps of a flow from noise to data: the pipeline itself cannot be given them."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=sigmas, device=device)


def prompts(seed: int, lengths: list[int]) -> PromptBatch:
    """Random embeddings with junk under the mask."""
    names, mask = [str(i) for i in range(len(lengths))], np.arange(6) < np.array(lengths)[:, None]
    text = np.random.default_rng(seed).standard_normal((len(lengths), 6, TINY.text_dim))
    return PromptBatch(names, names, text.astype(np.float32), mask)


def filled_up(batch: PromptBatch, count: int) -> torch.Tensor:
    text = np.zeros((count, TOKENS, TINY.text_dim), np.float32)
    text[:, :6] = np.where(batch.mask[..., None], batch.text, 0)
    return torch.tensor(text)


def test_text_to_video_equals_the_pipeline(tmp_path):
    transformer, vae = make_oracle(TINY), wan_vae_oracle.reference(VAE)
    transformer.save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    batch, negative = prompts(0, [4, 6]), prompts(1, [1])
    initial = np.random.default_rng(2).standard_normal((2, *LATENTS)).astype(np.float32)

    # diffusers
    pipeline = WanPipeline(None, None, vae, Euler(shift=SETTINGS.shift), transformer)
    pipeline.set_progress_bar_config(disable=True)

    def run(output_type: str):
        return pipeline(
            prompt_embeds=filled_up(batch, 2),
            negative_prompt_embeds=filled_up(negative, 2),
            height=SETTINGS.height,
            width=SETTINGS.width,
            num_frames=SETTINGS.frames,
            num_inference_steps=SETTINGS.steps,
            guidance_scale=SETTINGS.guidance,
            latents=torch.tensor(initial).permute(0, 4, 1, 2, 3),
            output_type=output_type,
        ).frames

    want = run("latent").permute(0, 2, 3, 4, 1).numpy()
    want_frames = np.round(255 * run("np")).astype(int)

    # Ours
    configs = [weights.load_config(tmp_path / name) for name in ("transformer", "vae")]
    params = [
        weights.load(tmp_path / name, config)
        for name, config in zip(("transformer", "vae"), configs, strict=True)
    ]
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    sampling = SETTINGS.sampling(configs[1], "highest")
    assert sampling.latent_shape == LATENTS
    sampler = Sampler(*configs, Policy(params[0]), params[1], negative, sampling, mesh)
    with jax.set_mesh(mesh):
        latents = np.asarray(sampler.sample(batch, key_data([0, 0], batch.ids), initial))
        frames = dict(sampler.decode(jnp.asarray(latents)))

    assert np.abs(want).max() > 1.0
    np.testing.assert_allclose(latents, want, rtol=0, atol=1e-4)
    frames = np.stack([frames[row] for row in range(2)]).astype(int)
    assert want_frames.std() > 5
    # A value may lie on the border between two levels.
    assert np.abs(frames - want_frames).max() <= 1
    assert np.mean(frames != want_frames) < 1e-3
