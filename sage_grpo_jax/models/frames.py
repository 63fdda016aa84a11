"""From latents to pixels: the VAE, whole or in tiles, and the rounding to 8 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sage_grpo_jax.models import vae, vae_tiling

TILINGS = ("off", *sorted(vae_tiling.OVERLAPS))


def decode_frames(
    params: vae.Params,
    latents_BxTxHxWxC: jax.Array,
    config: vae.VaeConfig,
    tiling: str = "off",
    precision: str = "highest",
) -> jax.Array:
    """Frames uint8 [B, F, H, W, 3] of clean latents.

    Args:
      params: of the VAE; only "decoder" is used.
      latents_BxTxHxWxC: as the diffusion model makes them, scaled by `config.scaling_factor`.
      config: of the VAE.
      tiling: one of `TILINGS`.
      precision: of float32 matmuls.
    """
    latents = latents_BxTxHxWxC / config.scaling_factor
    with jax.default_matmul_precision(precision):
        if tiling == "off":
            videos = vae.decode(params, latents, config)
        else:
            overlap = vae_tiling.OVERLAPS[tiling]
            videos = vae_tiling.decode_tiled(params, latents, config, overlap=overlap)
    return to_uint8(videos)


def to_uint8(videos: jax.Array) -> jax.Array:
    """[-1, 1] float -> 0..255, rounded; NaN becomes 0 (`finite_samples` finds such samples)."""
    pixels = jnp.clip(videos * 127.5 + 127.5, 0, 255)
    return jnp.round(jnp.nan_to_num(pixels)).astype(jnp.uint8)


def finite_samples(latents: jax.Array) -> jax.Array:
    """Which samples [B, ...] hold neither NaN nor infinity; bool [B]."""
    return jnp.isfinite(latents).all(axis=tuple(range(1, latents.ndim)))
