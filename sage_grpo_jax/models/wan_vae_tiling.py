"""The Wan 2.1 VAE on spatial tiles, as `vae_tiling` has it for HunyuanVideo-1.5.

Same numbers as `tiled_decode` and `tiled_encode` of diffusers' AutoencoderKLWan (overlap 0.25, the
default there). A tile covers all frames, and is itself coded in pieces of time where it is large:
but for input and output, memory depends neither on the size of the clip nor on its length.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sage_grpo_jax.models import vae_tiling, wan_vae
from sage_grpo_jax.models.wan_vae import Params, WanVaeConfig

_STATIC = ("config", "tile", "overlap", "latent_frames")


@functools.partial(jax.jit, static_argnames=_STATIC)
def decode_tiled(
    params: Params,
    latents_BxTxHxWxC: jax.Array,
    config: WanVaeConfig,
    *,
    tile: int = vae_tiling.TILE,
    overlap: float = vae_tiling.OVERLAPS["diffusers"],
    latent_frames: int | None = None,
) -> jax.Array:
    """Like `wan_vae.decode`, tile by tile; a clip that fits into one tile is decoded whole.

    Args:
      params: as from `wan_vae.init_params`; only "decoder" is used.
      latents_BxTxHxWxC: latents of the VAE, not normalised.
      config: shape of the VAE.
      tile: side of a tile in pixels.
      overlap: part of a tile that it shares with the next, at most 0.5.
      latent_frames: see `wan_vae.decode`, for a tile.

    Raises:
      ValueError: see `wan_vae.decode`; tile and overlap that do not come out as whole latents.
    """
    # Wrong latents are found by tracing the plain decoder, which computes nothing.
    jax.eval_shape(
        lambda p, z: wan_vae.decode(p, z, config, latent_frames), params, latents_BxTxHxWxC
    )

    def decode(decoder: Params, latents: jax.Array) -> jax.Array:
        return wan_vae.decode_unclipped({"decoder": decoder}, latents, config, latent_frames)

    ratio = config.spatial_compression_ratio
    videos = vae_tiling.decode_blended(
        decode, params["decoder"], latents_BxTxHxWxC, ratio, tile, overlap
    )
    return jnp.clip(videos, -1.0, 1.0)


@functools.partial(jax.jit, static_argnames=_STATIC)
def encode_tiled(
    params: Params,
    videos_BxFxHxWxC: jax.Array,
    config: WanVaeConfig,
    *,
    tile: int = vae_tiling.TILE,
    overlap: float = vae_tiling.OVERLAPS["diffusers"],
    latent_frames: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Like `wan_vae.encode`, tile by tile; a clip that fits into one tile is encoded whole.

    Args:
      params: as from `wan_vae.init_params`; only "encoder" is used.
      videos_BxFxHxWxC: in [-1, 1]; sizes as for `wan_vae.encode`.
      config: shape of the VAE.
      tile: side of a tile in pixels.
      overlap: part of a tile that it shares with the next, at most 0.5.
      latent_frames: see `wan_vae.encode`, for a tile.

    Returns:
      (mean, logvar) of the blended moments.

    Raises:
      ValueError: see `wan_vae.encode` and `decode_tiled`.
    """
    # The size is that of the clip: a tile that does not fit would be reported by its own.
    jax.eval_shape(
        lambda p, v: wan_vae.encode(p, v, config, latent_frames), params, videos_BxFxHxWxC
    )

    def encode(encoder: Params, videos: jax.Array) -> jax.Array:
        return wan_vae.encode_moments({"encoder": encoder}, videos, config, latent_frames)

    ratio = config.spatial_compression_ratio
    moments = vae_tiling.encode_blended(
        encode, params["encoder"], videos_BxFxHxWxC, ratio, tile, overlap
    )
    return wan_vae.split_moments(moments)
