"""A small random Wan transformer and VAE that fit each other, in folders that diffusers wrote."""

import pathlib
from typing import NamedTuple

import numpy as np
import wan_oracle
import wan_vae_oracle
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from sage_grpo_jax.models.wan import WanConfig
from sage_grpo_jax.models.wan_vae import WanVaeConfig

TRANSFORMER = wan_oracle.TINY
# Clips are 2 times as high and wide as their latents, and about 2 times as long.
VAE = WanVaeConfig(
    base_dim=3,
    z_dim=4,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.3, -0.5, 0.1, 0.9),
    latents_std=(2.0, 1.4, 0.6, 1.1),
)


class Pair(NamedTuple):
    """diffusers' models, and the folder with `transformer` and `vae`."""

    path: pathlib.Path
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan


class Euler(FlowMatchEulerDiscreteScheduler):
    """On the sigmas of Wan's own code, which diffusers' pipeline does not ask its scheduler for."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=sigmas, device=device)


def make_pair(
    folder: pathlib.Path,
    vae: WanVaeConfig = VAE,
    transformer: WanConfig = TRANSFORMER,
    **saving: str,
) -> Pair:
    """Saves both; `saving` goes to `save_pretrained`."""
    pair = Pair(folder, wan_oracle.make_oracle(transformer), wan_vae_oracle.reference(vae))
    pair.transformer.save_pretrained(folder / "transformer", **saving)
    pair.vae.save_pretrained(folder / "vae", **saving)
    return pair
