"""The causal video VAE of Wan 2.1: encoder and decoder.

Same architecture, and same numbers in float32, as `AutoencoderKLWan` of diffusers
(`autoencoders/autoencoder_kl_wan.py`), channels last. A clip has 1 + k * temporal ratio frames; the
first frame is coded by itself, and no frame sees a later one.

diffusers codes a clip in pieces of time, with caches. Here a small clip is coded in one pass over
all frames, and a large one in such pieces, to bound the memory; the numbers are the same.

Latents here are those of the VAE. The diffusion model works on `to_model_latents(mean, config)`,
and the caller maps its latents back with `to_vae_latents` once before `decode`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sage_grpo_jax.models import autoencoder, layers
from sage_grpo_jax.models.vae_layers import Pointwise, RmsNorm
from sage_grpo_jax.models.wan_config import VARIANTS
from sage_grpo_jax.models.wan_vae_config import WanVaeConfig
from sage_grpo_jax.models.wan_vae_layers import (
    CACHE,
    CausalConv,
    Downsample,
    MidBlock,
    ResnetBlock,
    Upsample,
)

Params = dict[str, Any]
NAME, Config = "Wan 2.1 VAE", WanVaeConfig
RELEASED = dict.fromkeys(VARIANTS, WanVaeConfig())
# Pixels that are coded at once where the caller does not say: four frames of 480 x 832, or fewer.
_PIXELS = 1 << 21


class Encoder(nn.Module):
    """Video [B, F, H, W, in_channels] -> moments [B, T, h, w, 2 * z_dim]."""

    config: WanVaeConfig

    @nn.compact
    def __call__(self, videos_BxFxHxWxC: jax.Array, starts: bool = True) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = CausalConv(config.base_dim, dtype, name="conv_in")(videos_BxFxHxWxC)
        for level in range(config.levels):
            h = DownBlock(config, level, name=f"down_{level}")(h, starts)
        h = MidBlock(dtype, name="mid")(h)
        h = nn.silu(RmsNorm(name="norm_out")(h))
        h = CausalConv(2 * config.z_dim, dtype, name="conv_out")(h)
        return Pointwise(2 * config.z_dim, dtype, name="quant")(h)


class DownBlock(nn.Module):
    """Resnets of one encoder level, then downsampling unless it is the last."""

    config: WanVaeConfig
    level: int

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array, starts: bool) -> jax.Array:
        config, h, dtype = self.config, h_BxTxHxWxC, jnp.dtype(self.config.dtype)
        for i in range(config.num_res_blocks):
            width = config.encoder_width(self.level)
            h = ResnetBlock(width, dtype, name=f"resnet_{i}")(h)
        if self.level == config.levels - 1:
            return h
        temporal = config.downsamples_time(self.level)
        return Downsample(temporal, dtype, name="downsample")(h, starts)


class Decoder(nn.Module):
    """Latents [B, T, h, w, z_dim] -> video [B, F, H, W, out_channels], not clipped."""

    config: WanVaeConfig

    @nn.compact
    def __call__(self, latents_BxTxHxWxC: jax.Array, starts: bool = True) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = Pointwise(config.z_dim, dtype, name="post_quant")(latents_BxTxHxWxC)
        h = CausalConv(config.decoder_width(0), dtype, name="conv_in")(h)
        h = MidBlock(dtype, name="mid")(h)
        for level in range(config.levels):
            h = UpBlock(config, level, name=f"up_{level}")(h, starts)
        h = nn.silu(RmsNorm(name="norm_out")(h))
        return CausalConv(config.out_channels, dtype, name="conv_out")(h)


class UpBlock(nn.Module):
    """Resnets of one decoder level (0 = coarsest), then upsampling unless it is the last."""

    config: WanVaeConfig
    level: int

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array, starts: bool) -> jax.Array:
        config, h, dtype = self.config, h_BxTxHxWxC, jnp.dtype(self.config.dtype)
        for i in range(config.num_res_blocks + 1):
            width = config.decoder_width(self.level)
            h = ResnetBlock(width, dtype, name=f"resnet_{i}")(h)
        if self.level == config.levels - 1:
            return h
        temporal = config.upsamples_time(self.level)
        return Upsample(temporal, dtype, name="upsample")(h, starts)


@functools.partial(jax.jit, static_argnums=0)
def _init_boxed(config: WanVaeConfig, key: jax.Array) -> Params:
    """Both parameter trees, each array in Flax's box of logical axis names."""
    return autoencoder.init_boxed(Encoder(config), Decoder(config), config, key)


def init_params(config: WanVaeConfig, key: jax.Array) -> Params:
    """Random float32 parameters {"encoder": ..., "decoder": ...} as nested dicts of arrays.

    Works under `jax.eval_shape`, also at the full size.
    """
    return nn.unbox(_init_boxed(config, key))


def partition_names(config: WanVaeConfig) -> Params:
    """Tree like the parameters; each leaf the tuple of logical axis names of that parameter."""
    return layers.partition_names(_init_boxed, config)


def to_model_latents(means_BxTxHxWxC: jax.Array, config: WanVaeConfig) -> jax.Array:
    """Latents of the VAE in the units of the diffusion model: centred and scaled by channel."""
    return (means_BxTxHxWxC - jnp.array(config.latents_mean)) / jnp.array(config.latents_std)


def to_vae_latents(latents_BxTxHxWxC: jax.Array, config: WanVaeConfig) -> jax.Array:
    """The inverse of `to_model_latents`."""
    return latents_BxTxHxWxC * jnp.array(config.latents_std) + jnp.array(config.latents_mean)


def encode(
    params: Params,
    videos_BxFxHxWxC: jax.Array,
    config: WanVaeConfig,
    latent_frames: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Posterior of the latents of each clip.

    Args:
      params: as from `init_params`; only "encoder" is used.
      videos_BxFxHxWxC: in [-1, 1]; F = 1 + k * t for the temporal ratio t, H and W multiples of the
        spatial ratio s.
      config: shape of the VAE.
      latent_frames: after the first frame, encode the frames of so many latents at once; None: the
        whole clip if it is small, else as many as memory likes. The numbers are the same.

    Returns:
      (mean, logvar), each float32 [B, T, H / s, W / s, z_dim], not normalised, with
      T = 1 + (F - 1) / t. logvar is clipped to [-30, 20], as in diffusers.

    Raises:
      ValueError: if the clip does not fit the compression ratios, or `latent_frames` < 1.
    """
    autoencoder.check_clip(videos_BxFxHxWxC, config)
    batch, frames, height, width, _ = videos_BxFxHxWxC.shape
    t = config.temporal_compression_ratio
    at_once = _at_once(latent_frames, (frames - 1) // t, batch * t * height * width)
    return autoencoder.posterior(
        _over_time(Encoder(config), params["encoder"], videos_BxFxHxWxC, t * at_once)
    )


def decode(
    params: Params,
    latents_BxTxHxWxC: jax.Array,
    config: WanVaeConfig,
    latent_frames: int | None = None,
) -> jax.Array:
    """Videos float32 [B, 1 + (T - 1) * t, H * s, W * s, out_channels], clipped to [-1, 1].

    Args:
      params: as from `init_params`; only "decoder" is used.
      latents_BxTxHxWxC: latents of the VAE, not normalised.
      config: shape of the VAE.
      latent_frames: after the first latent frame, decode so many at once; None: the whole clip if
        it is small, else as many as memory likes. The numbers are the same.

    Raises:
      ValueError: if the latents are empty or do not have `z_dim` channels, or `latent_frames` < 1.
    """
    return clip_pixels(decode_unclipped(params, latents_BxTxHxWxC, config, latent_frames))


def clip_pixels(videos: jax.Array) -> jax.Array:
    """The last step of `decode`."""
    return jnp.clip(videos, -1.0, 1.0)


def decode_unclipped(
    params: Params,
    latents_BxTxHxWxC: jax.Array,
    config: WanVaeConfig,
    latent_frames: int | None = None,
) -> jax.Array:
    """`decode` without the last step; tiles are blended before it."""
    autoencoder.check_latents(latents_BxTxHxWxC, config)
    batch, frames, height, width, _ = latents_BxTxHxWxC.shape
    s, t = config.spatial_compression_ratio, config.temporal_compression_ratio
    at_once = _at_once(latent_frames, frames - 1, batch * t * height * s * width * s)
    videos = _over_time(Decoder(config), params["decoder"], latents_BxTxHxWxC, at_once)
    return videos.astype(jnp.float32)


def _at_once(latent_frames: int | None, rest: int, pixels: int) -> int:
    """How many latent frames to code at once, after the first; 0: the whole clip.

    Args:
      latent_frames: what the caller wants.
      rest: latent frames after the first.
      pixels: that one of them takes, in all clips.
    """
    if latent_frames is None:
        most = max(1, _PIXELS // max(1, pixels))
        return 0 if rest < most else most
    if latent_frames < 1:
        raise ValueError(f"latent_frames={latent_frames}: must be None or at least 1")
    return latent_frames


def _over_time(module: nn.Module, params: Params, x_BxTxHxWxC: jax.Array, piece: int) -> jax.Array:
    """The module over all frames: at once, or the first one, then `piece` at a time in one loop."""
    if piece == 0:
        return module.apply({"params": params}, x_BxTxHxWxC)

    def run(cache: Params, frames: jax.Array, starts: bool = False) -> tuple[Params, jax.Array]:
        variables = {"params": params, CACHE: cache}
        y, state = module.apply(variables, frames, starts, mutable=[CACHE])
        return state[CACHE], y

    cache, first = run({}, x_BxTxHxWxC[:, :1], starts=True)
    done, rest = [first], x_BxTxHxWxC[:, 1:]
    batch, frames, *place = rest.shape
    count, left = divmod(frames, piece)
    if count:
        pieces = rest[:, : frames - left].reshape(batch, count, piece, *place)
        cache, ys = lax.scan(run, cache, pieces.swapaxes(0, 1))
        done.append(ys.swapaxes(0, 1).reshape(batch, -1, *ys.shape[3:]))
    if left:
        done.append(run(cache, rest[:, frames - left :])[1])
    return jnp.concatenate(done, axis=1)
