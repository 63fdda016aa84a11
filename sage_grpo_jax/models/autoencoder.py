"""What the video autoencoders have in common: parameters, checks of their inputs, the posterior.

Their configs have `in_channels`, the channels of the pixels, besides what the door asks for.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp


def init_boxed(
    encoder: nn.Module, decoder: nn.Module, config: Any, key: jax.Array
) -> dict[str, Any]:
    """Float32 parameters {"encoder": ..., "decoder": ...}, in Flax's boxes of logical axis names.

    To be called under jit, so that the forward pass which Linen uses to find the shapes is never
    run.
    """
    side = config.spatial_compression_ratio
    video = jnp.zeros((1, 1, side, side, config.in_channels))
    latent = jnp.zeros((1, 1, 1, 1, config.latent_channels))
    encoder_key, decoder_key = jax.random.split(key)
    return {
        "encoder": encoder.init(encoder_key, video)["params"],
        "decoder": decoder.init(decoder_key, latent)["params"],
    }


def posterior(moments_BxTxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, logvar) in float32: the halves of the channels; logvar is clipped to [-30, 20].

    As `DiagonalGaussianDistribution` of diffusers.
    """
    mean, logvar = jnp.split(moments_BxTxHxWxC.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def check_clip(videos_BxFxHxWxC: jax.Array, config: Any) -> None:
    """Raises a ValueError unless the config's encoder makes whole latents of the clips."""
    chex.assert_rank(videos_BxFxHxWxC, 5)
    _, frames, height, width, channels = videos_BxFxHxWxC.shape
    s, t = config.spatial_compression_ratio, config.temporal_compression_ratio
    if not frames or (frames - 1) % t:
        raise ValueError(f"frames={frames}: must be 1 plus a multiple of {t}")
    if not height or not width or height % s or width % s:
        raise ValueError(f"height={height}, width={width}: must be multiples of {s}")
    if channels != config.in_channels:
        raise ValueError(f"channels={channels}: must be in_channels={config.in_channels}")


def check_latents(latents_BxTxHxWxC: jax.Array, config: Any) -> None:
    """Raises a ValueError unless the latents are some, and of the config's channels."""
    chex.assert_rank(latents_BxTxHxWxC, 5)
    _, frames, height, width, channels = latents_BxTxHxWxC.shape
    if not frames or not height or not width:
        raise ValueError(f"frames={frames}, height={height}, width={width}: must be at least 1")
    if channels != config.latent_channels:
        raise ValueError(f"channels={channels}: must be latent_channels={config.latent_channels}")
