"""Building blocks of the HunyuanVideo-1.5 VAE, see `vae_layers`.

The behaviour of each block is that of the class of the same name in diffusers'
`autoencoders/autoencoder_kl_hunyuanvideo15.py`.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sage_grpo_jax.models import convolution, vae_layers
from sage_grpo_jax.models.vae_layers import conv_parameters

# Above this many tokens the mid-block attention runs frame by frame, to bound the score matrix.
_DENSE_ATTENTION_TOKENS = 2048


class CausalConv(nn.Module):
    """3x3x3 convolution with bias, causal in time, replicated edges."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        channels = h_BxTxHxWxC.shape[-1]
        kernel, bias = conv_parameters(self, (3, 3, 3), channels, self.features, self.dtype)
        return convolution.causal_convolution(h_BxTxHxWxC.astype(self.dtype), kernel) + bias


def frame_causal_attention(
    query_BxTxNxC: jax.Array, key_BxTxNxC: jax.Array, value_BxTxNxC: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(C)) v, where a token sees the tokens of its own and of earlier frames.

    Short clips take one product; long ones go frame by frame (and recompute the scores in the
    backward pass), so that memory holds N x T*N scores instead of T*N x T*N.
    """
    frames, tokens = query_BxTxNxC.shape[1:3]
    if frames * tokens <= _DENSE_ATTENTION_TOKENS:
        return _attend(query_BxTxNxC, jnp.arange(frames), key_BxTxNxC, value_BxTxNxC)

    @jax.checkpoint
    def one_frame(frame_and_index: tuple[jax.Array, jax.Array]) -> jax.Array:
        query_BxNxC, index = frame_and_index
        return _attend(query_BxNxC[:, None], index[None], key_BxTxNxC, value_BxTxNxC)[:, 0]

    out_TxBxNxC = lax.map(one_frame, (query_BxTxNxC.swapaxes(0, 1), jnp.arange(frames)))
    return out_TxBxNxC.swapaxes(0, 1)


def _attend(
    query_BxQxNxC: jax.Array, index_Q: jax.Array, key_BxTxMxC: jax.Array, value_BxTxMxC: jax.Array
) -> jax.Array:
    """Attention of the query frames with the given indices."""
    channels, frames = query_BxQxNxC.shape[-1], key_BxTxMxC.shape[1]
    scores_BxQxNxTxM = jnp.einsum(
        "bqnc,btmc->bqntm",
        query_BxQxNxC,
        key_BxTxMxC,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    visible_QxT = jnp.arange(frames)[None, :] <= index_Q[:, None]
    scores_BxQxNxTxM = jnp.where(
        visible_QxT[None, :, None, :, None], scores_BxQxNxTxM * channels**-0.5, -jnp.inf
    )
    weights_BxQxNxTxM = jax.nn.softmax(scores_BxQxNxTxM, axis=(-2, -1)).astype(value_BxTxMxC.dtype)
    return jnp.einsum(
        "bqntm,btmc->bqnc", weights_BxQxNxTxM, value_BxTxMxC, precision=lax.Precision.HIGHEST
    )


ResnetBlock = functools.partial(vae_layers.ResnetBlock, CausalConv)
MidBlock = functools.partial(vae_layers.MidBlock, CausalConv, frame_causal_attention)


class Downsample(nn.Module):
    """Halves height and width, and the frames after the first if `temporal`: space to channels.

    The first frame stands for itself: it is packed in space only and its channels are doubled.
    """

    features: int
    temporal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        factor = 8 if self.temporal else 4
        h = CausalConv(self.features // factor, self.dtype, name="conv")(h_BxTxHxWxC)
        if not self.temporal:
            return _pack(h, 1) + group_mean(_pack(h_BxTxHxWxC, 1), self.features)
        first = _pack(h[:, :1], 1)
        first = jnp.concatenate([first, first], axis=-1)
        first += group_mean(_pack(h_BxTxHxWxC[:, :1], 1), self.features)
        rest = _pack(h[:, 1:], 2) + group_mean(_pack(h_BxTxHxWxC[:, 1:], 2), self.features)
        return jnp.concatenate([first, rest], axis=1)


class Upsample(nn.Module):
    """Doubles height and width, and the frames after the first if `temporal`: channels to space.

    The first frame is unpacked in space only, from the first half of its channels.
    """

    features: int
    temporal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        factor = 8 if self.temporal else 4
        repeats = factor * self.features // h_BxTxHxWxC.shape[-1]
        h = CausalConv(self.features * factor, self.dtype, name="conv")(h_BxTxHxWxC)
        if not self.temporal:
            return _unpack(h, 1) + _unpack(jnp.repeat(h_BxTxHxWxC, repeats, axis=-1), 1)
        first = _unpack(h[:, :1], 1)[..., : self.features]
        first += jnp.repeat(_unpack(h_BxTxHxWxC[:, :1], 1), repeats // 2, axis=-1)
        rest = _unpack(h[:, 1:], 2) + jnp.repeat(_unpack(h_BxTxHxWxC[:, 1:], 2), repeats, axis=-1)
        return jnp.concatenate([first, rest], axis=1)


def group_mean(h: jax.Array, features: int) -> jax.Array:
    """Means of equal runs of channels: [.., C] -> [.., features]."""
    return h.reshape(*h.shape[:-1], features, h.shape[-1] // features).mean(axis=-1)


def _pack(h: jax.Array, r: int) -> jax.Array:
    """[B, T*r, H*2, W*2, C] -> [B, T, H, W, r*2*2*C]."""
    batch, frames, height, width, channels = h.shape
    h = h.reshape(batch, frames // r, r, height // 2, 2, width // 2, 2, channels)
    h = h.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return h.reshape(batch, frames // r, height // 2, width // 2, r * 4 * channels)


def _unpack(h: jax.Array, r: int) -> jax.Array:
    """[B, T, H, W, r*2*2*C] -> [B, T*r, H*2, W*2, C]."""
    batch, frames, height, width, packed = h.shape
    channels = packed // (r * 4)
    h = h.reshape(batch, frames, height, width, r, 2, 2, channels)
    h = h.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return h.reshape(batch, frames * r, height * 2, width * 2, channels)
