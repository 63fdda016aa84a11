"""The causal video VAE of HunyuanVideo-1.5: encoder and decoder.

Same architecture, and same numbers in float32, as `AutoencoderKLHunyuanVideo15` of diffusers
(`autoencoders/autoencoder_kl_hunyuanvideo15.py`), channels last. A clip has 1 + k * temporal ratio
frames; the first frame is coded by itself, and no frame sees a later one.

Latents here are unscaled: the diffusion model works on `to_model_latents(mean, config)`, and the
caller maps its latents back with `to_vae_latents` once before `decode`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models import autoencoder, layers
from sage_grpo_jax.models.hunyuan_vae_layers import (
    CausalConv,
    Downsample,
    MidBlock,
    ResnetBlock,
    Upsample,
    group_mean,
)
from sage_grpo_jax.models.hunyuan_video_config import VARIANTS
from sage_grpo_jax.models.vae_layers import RmsNorm

Params = dict[str, Any]
# Far beyond the released model; what is larger comes from a damaged file.
_BOUNDS = {
    "in_channels": 4096,
    "out_channels": 4096,
    "latent_channels": 4096,
    "layers_per_block": 32,
}
_MAX_WIDTH, _MAX_LEVELS, _MAX_RATIO = 1 << 16, 16, 1 << 10


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Shape of the VAE. Field names and defaults are those of diffusers, except `dtype`.

    Attributes:
      in_channels: channels of the encoded video.
      out_channels: channels of the decoded video.
      latent_channels: channels of the latents.
      block_out_channels: width of each level, finest first.
      layers_per_block: resnets per encoder level; decoder levels have one more.
      spatial_compression_ratio: a power of two.
      temporal_compression_ratio: a power of two, at most the spatial one.
      downsample_match_channel: whether downsampling already changes to the next level's width.
      upsample_match_channel: the same for upsampling.
      scaling_factor: latents of the diffusion model = mean * scaling_factor.
      dtype: compute dtype of convolutions and attention; norms and softmax are float32, parameters
        stay as they are given. "float32" means float32 on every platform, TPUs included.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    layers_per_block: int = 2
    spatial_compression_ratio: int = 16
    temporal_compression_ratio: int = 4
    downsample_match_channel: bool = True
    upsample_match_channel: bool = True
    scaling_factor: float = 1.03682
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        _validate(self)

    @property
    def spatial_steps(self) -> int:
        return int(math.log2(self.spatial_compression_ratio))

    @property
    def temporal_steps(self) -> int:
        return int(math.log2(self.temporal_compression_ratio))

    def downsampled_width(self, level: int) -> int:
        """Width after the downsampling of encoder level `level` (0 = finest)."""
        return self.block_out_channels[level + self.downsample_match_channel]

    def upsampled_width(self, level: int) -> int:
        """Width after the upsampling of decoder level `level` (0 = coarsest)."""
        return self.block_out_channels[::-1][level + self.upsample_match_channel]

    def encoder_input_width(self, level: int) -> int:
        """Width that enters encoder level `level`."""
        if level == 0:
            return self.block_out_channels[0]
        if level <= self.spatial_steps:
            return self.downsampled_width(level - 1)
        return self.block_out_channels[level - 1]

    def decoder_input_width(self, level: int) -> int:
        """Width that enters decoder level `level`."""
        if level == 0:
            return self.block_out_channels[-1]
        if level <= self.spatial_steps:
            return self.upsampled_width(level - 1)
        return self.block_out_channels[::-1][level - 1]

    @classmethod
    def from_json(cls, text: str, **overrides: Any) -> VaeConfig:
        """From the text of a diffusers `config.json`; keys starting with "_" are ignored.

        Raises:
          ValueError: fields that are unknown, or values that they cannot have.
        """
        return cls.from_values(checked_json.parse(text), **overrides)

    @classmethod
    def from_values(cls, values: dict[str, Any], **overrides: Any) -> VaeConfig:
        """The same, from the JSON object."""
        given = {name: value for name, value in values.items() if not name.startswith("_")}
        return cls(**(checked_json.fields(cls, given, ("dtype",)) | overrides))

    def to_json(self) -> str:
        """The text of a diffusers `config.json`; without `dtype`, which diffusers does not know."""
        values = dataclasses.asdict(self)
        del values["dtype"]
        return json.dumps({"_class_name": "AutoencoderKLHunyuanVideo15", **values}, indent=2) + "\n"


def _validate(config: VaeConfig) -> None:
    for name in ("spatial_compression_ratio", "temporal_compression_ratio"):
        value = getattr(config, name)
        if not 1 <= value <= _MAX_RATIO or value & (value - 1):
            raise ValueError(f"{name}={value}: must be a power of two up to {_MAX_RATIO}")
    if config.temporal_compression_ratio > config.spatial_compression_ratio:
        raise ValueError(
            f"temporal_compression_ratio={config.temporal_compression_ratio}: must be at most "
            f"spatial_compression_ratio={config.spatial_compression_ratio}"
        )
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={config.dtype!r}: must be float32, bfloat16 or float16")
    for name, most in _BOUNDS.items():
        if not 1 <= getattr(config, name) <= most:
            raise ValueError(f"{name}={getattr(config, name)}: must be 1 to {most}")
    if not 0 < config.scaling_factor < math.inf:
        raise ValueError(f"scaling_factor={config.scaling_factor}: must be positive and finite")
    _validate_widths(config)


def _validate_widths(config: VaeConfig) -> None:
    """The shortcuts average or repeat whole runs of channels: the widths have to divide."""
    widths = config.block_out_channels

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"block_out_channels={checked_json.shown(widths)}: {what}")

    matching = config.downsample_match_channel or config.upsample_match_channel
    levels = config.spatial_steps + matching
    require(max(levels, 1) <= len(widths) <= _MAX_LEVELS, f"needs at least {levels} levels, and "
            f"at most {_MAX_LEVELS}")  # fmt: skip
    require(all(1 <= width <= _MAX_WIDTH for width in widths), f"each must be 1 to {_MAX_WIDTH}")
    require(
        widths[-1] % (2 * config.latent_channels) == 0,
        f"the last must be a multiple of 2 * latent_channels = {2 * config.latent_channels}",
    )
    for level in range(config.spatial_steps):
        temporal = level >= config.spatial_steps - config.temporal_steps
        _validate_resampling(require, config.downsampled_width(level), widths[level], temporal)
        level_up, temporal = len(widths) - 1 - level, level < config.temporal_steps
        _validate_resampling(require, widths[level_up], config.upsampled_width(level), temporal)


def _validate_resampling(
    require: Callable[[bool, str], None], coarse: int, fine: int, temporal: bool
) -> None:
    factor = 8 if temporal else 4
    require(coarse % factor == 0, f"{coarse} must be a multiple of {factor}")
    # At temporal levels half a run of channels serves the first frame, so the run must be even.
    unit = coarse * (2 if temporal else 1)
    require(factor * fine % unit == 0, f"{factor} * {fine} must be a multiple of {unit}")


NAME, Config = "HunyuanVideo-1.5 VAE", VaeConfig
RELEASED = dict.fromkeys(VARIANTS, VaeConfig())


class Encoder(nn.Module):
    """Video [B, F, H, W, 3] -> moments [B, T, h, w, 2 * latent_channels]."""

    config: VaeConfig

    @nn.compact
    def __call__(self, videos_BxFxHxWxC: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = CausalConv(config.block_out_channels[0], dtype, name="conv_in")(videos_BxFxHxWxC)
        for level in range(len(config.block_out_channels)):
            h = DownBlock(config, level, name=f"down_{level}")(h)
        h = MidBlock(dtype, name="mid")(h)
        shortcut = group_mean(h, 2 * config.latent_channels)
        h = nn.silu(RmsNorm(name="norm_out")(h))
        return CausalConv(2 * config.latent_channels, dtype, name="conv_out")(h) + shortcut


class DownBlock(nn.Module):
    """Resnets of one encoder level, then downsampling where the level has it."""

    config: VaeConfig
    level: int

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        config, h, dtype = self.config, h_BxTxHxWxC, jnp.dtype(self.config.dtype)
        for i in range(config.layers_per_block):
            width = config.block_out_channels[self.level]
            h = ResnetBlock(width, dtype, name=f"resnet_{i}")(h)
        if self.level >= config.spatial_steps:
            return h
        temporal = self.level >= config.spatial_steps - config.temporal_steps
        width = config.downsampled_width(self.level)
        return Downsample(width, temporal, dtype, name="downsample")(h)


class Decoder(nn.Module):
    """Latents [B, T, h, w, latent_channels] -> video [B, F, H, W, 3]."""

    config: VaeConfig

    @nn.compact
    def __call__(self, latents_BxTxHxWxC: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.block_out_channels[-1]
        h = CausalConv(width, dtype, name="conv_in")(latents_BxTxHxWxC)
        h += jnp.repeat(latents_BxTxHxWxC, width // config.latent_channels, axis=-1).astype(dtype)
        h = MidBlock(dtype, name="mid")(h)
        for level in range(len(config.block_out_channels)):
            h = UpBlock(config, level, name=f"up_{level}")(h)
        h = nn.silu(RmsNorm(name="norm_out")(h))
        return CausalConv(config.out_channels, dtype, name="conv_out")(h)


class UpBlock(nn.Module):
    """Resnets of one decoder level (0 = coarsest), then upsampling where the level has it."""

    config: VaeConfig
    level: int

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        config, h, dtype = self.config, h_BxTxHxWxC, jnp.dtype(self.config.dtype)
        for i in range(config.layers_per_block + 1):
            width = config.block_out_channels[::-1][self.level]
            h = ResnetBlock(width, dtype, name=f"resnet_{i}")(h)
        if self.level >= config.spatial_steps:
            return h
        temporal = self.level < config.temporal_steps
        width = config.upsampled_width(self.level)
        return Upsample(width, temporal, dtype, name="upsample")(h)


@functools.partial(jax.jit, static_argnums=0)
def _init_boxed(config: VaeConfig, key: jax.Array) -> Params:
    """Both parameter trees, each array in Flax's box of logical axis names."""
    return autoencoder.init_boxed(Encoder(config), Decoder(config), config, key)


def init_params(config: VaeConfig, key: jax.Array) -> Params:
    """Random float32 parameters {"encoder": ..., "decoder": ...} as nested dicts of arrays.

    Works under `jax.eval_shape`, also at the full size.
    """
    return nn.unbox(_init_boxed(config, key))


def partition_names(config: VaeConfig) -> Params:
    """Tree like the parameters; each leaf the tuple of logical axis names of that parameter."""
    return layers.partition_names(_init_boxed, config)


def encode(
    params: Params, videos_BxFxHxWxC: jax.Array, config: VaeConfig
) -> tuple[jax.Array, jax.Array]:
    """Posterior of the latents of each clip.

    Args:
      params: as from `init_params`; only "encoder" is used.
      videos_BxFxHxWxC: in [-1, 1]; F = 1 + k * t for the temporal ratio t, H and W multiples of the
        spatial ratio s.
      config: shape of the VAE.

    Returns:
      (mean, logvar), each float32 [B, T, H / s, W / s, latent_channels], unscaled, with
      T = 1 + (F - 1) / t. logvar is clipped to [-30, 20], as in diffusers.

    Raises:
      ValueError: if the clip does not fit the compression ratios.
    """
    autoencoder.check_clip(videos_BxFxHxWxC, config)
    return autoencoder.posterior(
        Encoder(config).apply({"params": params["encoder"]}, videos_BxFxHxWxC)
    )


def decode(params: Params, latents_BxTxHxWxC: jax.Array, config: VaeConfig) -> jax.Array:
    """Videos float32 [B, 1 + (T - 1) * t, H * s, W * s, out_channels], nominally in [-1, 1].

    Args:
      params: as from `init_params`; only "decoder" is used.
      latents_BxTxHxWxC: unscaled latents.
      config: shape of the VAE.

    Raises:
      ValueError: if the latents are empty or do not have `latent_channels` channels.
    """
    autoencoder.check_latents(latents_BxTxHxWxC, config)
    videos = Decoder(config).apply({"params": params["decoder"]}, latents_BxTxHxWxC)
    return videos.astype(jnp.float32)


# Nothing is clipped here: tiles are blended as they are.
decode_unclipped = decode


def clip_pixels(videos: jax.Array) -> jax.Array:
    """The videos as they are."""
    return videos


def to_model_latents(latents: jax.Array, config: VaeConfig) -> jax.Array:
    """Latents of the VAE in the units of the diffusion model."""
    return latents * config.scaling_factor


def to_vae_latents(latents: jax.Array, config: VaeConfig) -> jax.Array:
    """The inverse of `to_model_latents`."""
    return latents / config.scaling_factor
