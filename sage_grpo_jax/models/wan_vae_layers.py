"""Building blocks of the Wan 2.1 VAE, see `vae_layers`.

The behaviour of each block is that of the class of the same name in diffusers'
`autoencoders/autoencoder_kl_wan.py`, which sees a clip in pieces of time: the first frame, then
a few frames at once, and a cache of earlier frames in each layer that looks back.

Here the same layers take the whole clip at once, or piece by piece. What a layer looks back on is
in front of its input: zeros where the clip begins, and in later pieces the last frames of the piece
before. Those are in the variable collection `CACHE`, which exists only if the caller makes it
mutable. `starts` says whether the clip begins with the given frames.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sage_grpo_jax.models import convolution, vae_layers
from sage_grpo_jax.models.vae_layers import conv_parameters

CACHE = "cache"
# Above this many scores the attention runs frame by frame.
_DENSE_SCORES = 2048**2


def with_history(module: nn.Module, h_BxTxHxWxC: jax.Array, frames: int) -> jax.Array:
    """The `frames` frames before h, then h; and keeps the last ones for the next piece."""
    batch, _, *rest = h_BxTxHxWxC.shape
    if not module.is_mutable_collection(CACHE):
        return jnp.pad(h_BxTxHxWxC, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))
    before = module.variable(CACHE, "before", jnp.zeros, (batch, frames, *rest), h_BxTxHxWxC.dtype)
    h = jnp.concatenate([before.value, h_BxTxHxWxC], axis=1)
    before.value = h[:, -frames:]
    return h


class CausalConv(nn.Module):
    """3x3x3 convolution with bias, causal in time, zeros at the edges."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        channels = h_BxTxHxWxC.shape[-1]
        kernel, bias = conv_parameters(self, (3, 3, 3), channels, self.features, self.dtype)
        h = with_history(self, h_BxTxHxWxC.astype(self.dtype), 2)
        return convolution.valid_convolution(_pad_rows_and_columns(h), kernel) + bias


class TemporalConv(nn.Module):
    """Convolution with bias over three frames of each place, every `stride` frames, no padding."""

    features: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        frames, channels = h_BxTxHxWxC.shape[1], h_BxTxHxWxC.shape[-1]
        kernel, bias = conv_parameters(self, (3, 1, 1), channels, self.features, self.dtype)
        outputs = (frames - 3) // self.stride + 1
        taps = [
            jnp.einsum(
                "bthwc,co->bthwo",
                h_BxTxHxWxC[:, tap :: self.stride][:, :outputs].astype(self.dtype),
                kernel[tap, 0, 0],
                precision=lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            for tap in range(3)
        ]
        return sum(taps).astype(self.dtype) + bias


def attention_in_frames(
    query_BxTxNxC: jax.Array, key_BxTxNxC: jax.Array, value_BxTxNxC: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(C)) v within each frame.

    Many scores are computed frame by frame (and again in the backward pass), so that memory holds
    those of one frame.
    """
    batch, frames, tokens, _ = query_BxTxNxC.shape
    if batch * frames * tokens**2 <= _DENSE_SCORES:
        return _attend(query_BxTxNxC, key_BxTxNxC, value_BxTxNxC)
    one_frame = jax.checkpoint(lambda qkv: _attend(*qkv))
    qkv_FxNxC = [x.reshape(-1, *x.shape[2:]) for x in (query_BxTxNxC, key_BxTxNxC, value_BxTxNxC)]
    return lax.map(one_frame, tuple(qkv_FxNxC)).reshape(value_BxTxNxC.shape)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention over the axis before the last."""
    scores = jnp.einsum(
        "...nc,...mc->...nm",
        query,
        key,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("...nm,...mc->...nc", weights, value, precision=lax.Precision.HIGHEST)


ResnetBlock = functools.partial(vae_layers.ResnetBlock, CausalConv)
MidBlock = functools.partial(vae_layers.MidBlock, CausalConv, attention_in_frames)


class Downsample(nn.Module):
    """Halves height and width, and the frames after the first if `temporal`.

    The first frame of the clip stands for itself; from then on two frames, with the one before
    them, become one.
    """

    temporal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array, starts: bool) -> jax.Array:
        channels = h_BxTxHxWxC.shape[-1]
        h = HalvingConv(channels, self.dtype, name="conv")(h_BxTxHxWxC)
        if not self.temporal:
            return h
        first, seen = h[:, : int(starts)], with_history(self, h, 1)[:, int(starts) :]
        h = TemporalConv(channels, 2, self.dtype, name="time_conv")(seen)
        return jnp.concatenate([first, h], axis=1)


class Upsample(nn.Module):
    """Doubles height and width, and the frames after the first if `temporal`; halves the channels.

    The first frame of the clip stands for itself, and later ones do not look back on it.
    """

    temporal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array, starts: bool) -> jax.Array:
        channels, h = h_BxTxHxWxC.shape[-1], h_BxTxHxWxC
        if self.temporal:
            first, rest = h[:, : int(starts)], h[:, int(starts) :]
            time_conv = TemporalConv(2 * channels, 1, self.dtype, name="time_conv")
            pairs = time_conv(with_history(self, rest, 2))
            h = jnp.concatenate([first, _frames_of_pairs(pairs)], axis=1)
        h = jnp.repeat(jnp.repeat(h, 2, axis=2), 2, axis=3)
        return ImageConv(channels // 2, self.dtype, name="conv")(h)


class ImageConv(nn.Module):
    """3x3 convolution with bias of each frame, zeros at the edges."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        channels = h_BxTxHxWxC.shape[-1]
        kernel, bias = conv_parameters(self, (3, 3), channels, self.features, self.dtype)
        h = _pad_rows_and_columns(h_BxTxHxWxC.astype(self.dtype))
        return convolution.valid_convolution(h, kernel[None]) + bias


class HalvingConv(nn.Module):
    """3x3 convolution with bias at every other row and column, zeros at the lower right edges."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        batch, frames, *image = h_BxTxHxWxC.shape
        kernel, bias = conv_parameters(self, (3, 3), image[-1], self.features, self.dtype)
        h = lax.conv_general_dilated(
            h_BxTxHxWxC.reshape(batch * frames, *image).astype(self.dtype),
            kernel,
            (2, 2),
            ((0, 1), (0, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return h.reshape(batch, frames, *h.shape[1:]) + bias


def _pad_rows_and_columns(h: jax.Array) -> jax.Array:
    return jnp.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))


def _frames_of_pairs(h: jax.Array) -> jax.Array:
    """[B, T, H, W, 2 * C] -> [B, 2 * T, H, W, C]: the earlier frame has the first channels."""
    batch, frames, height, width, channels = h.shape
    h = h.reshape(batch, frames, height, width, 2, channels // 2).transpose(0, 1, 4, 2, 3, 5)
    return h.reshape(batch, 2 * frames, height, width, channels // 2)
