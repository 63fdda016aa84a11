"""Between latents and pixels, for any VAE: sizes, decoding whole or in tiles, rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sage_grpo_jax.models import registry, vae_tiling
from sage_grpo_jax.models.door import AutoencoderConfig, TransformerConfig

TILINGS = ("off", *sorted(vae_tiling.OVERLAPS))


def latent_shape(
    config: AutoencoderConfig, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """Frames, height, width, channels of the latents of one clip; sizes are in pixels."""
    ratio = config.spatial_compression_ratio
    latent_frames = (frames - 1) // config.temporal_compression_ratio + 1
    return (latent_frames, height // ratio, width // ratio, config.latent_channels)


def check_clip(
    transformer: TransformerConfig,
    vae: AutoencoderConfig,
    frames: int,
    height: int,
    width: int,
    name: Callable[[str], str],
) -> None:
    """Checks that the VAE makes whole latents of a clip, and the transformer whole tokens of them.

    Args:
      transformer: config of the transformer.
      vae: config of the VAE.
      frames, height, width: of the clip, in pixels.
      name: what a message calls `frames`, `height` or `width`.

    Raises:
      ValueError: with the field, its value and what is allowed.
    """
    temporal, spatial = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    per_token = transformer.patch[0]
    latent_frames = (frames - 1) // temporal + 1
    if (frames - 1) % temporal or latent_frames % per_token:
        allowed = f"1 + a multiple of {temporal}"
        if per_token > 1:
            allowed += f" that gives a multiple of {per_token} latent frames"
        raise ValueError(f"{name('frames')}: got {frames}; allowed: {allowed}")
    for field, value, patch in (
        ("height", height, transformer.patch[1]),
        ("width", width, transformer.patch[2]),
    ):
        if value % (spatial * patch):
            allowed = f"a multiple of {spatial * patch}"
            raise ValueError(f"{name(field)}: got {value}; allowed: {allowed}")


def decode_frames(
    params: Any,
    latents_BxTxHxWxC: jax.Array,
    config: AutoencoderConfig,
    tiling: str = "off",
    precision: str = "highest",
) -> jax.Array:
    """Frames uint8 [B, F, H, W, 3] of clean latents; arguments as of `decode_videos`."""
    return to_uint8(decode_videos(params, latents_BxTxHxWxC, config, tiling, precision))


def decode_videos(
    params: Any,
    latents_BxTxHxWxC: jax.Array,
    config: AutoencoderConfig,
    tiling: str = "off",
    precision: str = "highest",
) -> jax.Array:
    """Videos float32 [B, F, H, W, 3], nominally in [-1, 1], of clean latents.

    Args:
      params: of the VAE; only "decoder" is used.
      latents_BxTxHxWxC: in the units of the transformer.
      config: of the VAE.
      tiling: one of `TILINGS`.
      precision: of float32 matmuls.
    """
    model = registry.of(config)
    latents = model.to_vae_latents(latents_BxTxHxWxC, config)
    with jax.default_matmul_precision(precision):
        if tiling == "off":
            return model.decode(params, latents, config)
        overlap = vae_tiling.OVERLAPS[tiling]
        return vae_tiling.decode_tiled(params, latents, config, overlap=overlap)


def to_uint8(videos: jax.Array) -> jax.Array:
    """[-1, 1] float -> 0..255, rounded; NaN becomes 0 (`finite_samples` finds such samples)."""
    pixels = jnp.clip(videos * 127.5 + 127.5, 0, 255)
    return jnp.round(jnp.nan_to_num(pixels)).astype(jnp.uint8)


def finite_samples(latents: jax.Array) -> jax.Array:
    """Which samples [B, ...] hold neither NaN nor infinity; bool [B]."""
    return jnp.isfinite(latents).all(axis=tuple(range(1, latents.ndim)))
