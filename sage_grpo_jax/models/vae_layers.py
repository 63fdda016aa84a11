"""Building blocks that the video VAEs share: Linen modules, channels last.

Hidden states are h_BxTxHxWxC in the compute dtype; norms and the softmax are computed in float32.
What differs between the models is handed in: `conv`, the causal 3x3x3 convolution, called as
conv(features, dtype, name=...), and `attend`, the attention, in which each model has its own tokens
that a token sees.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# (query, key, value), each [B, T, N, C] with the N places of a frame -> [B, T, N, C].
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_kernel_init = nn.initializers.lecun_normal()


def conv_parameters(
    module: nn.Module, window: tuple[int, ...], channels: int, features: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Kernel [*window, channels, features] and bias [features] of a convolution, in `dtype`.

    Args:
      module: whose parameters they are; to be called in its compact method.
      window: size of the kernel.
      channels, features: of input and output.
      dtype: that of the computation; the parameters are float32.
    """
    names = (*(None,) * len(window), "conv_in", "conv_out")
    kernel = module.param(
        "kernel",
        nn.with_logical_partitioning(_kernel_init, names),
        (*window, channels, features),
    )
    bias = module.param(
        "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)), (features,)
    )
    return kernel.astype(dtype), bias.astype(dtype)


class Pointwise(nn.Module):
    """1x1x1 convolution with bias."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        dense = nn.Dense(
            self.features,
            dtype=self.dtype,
            precision=lax.Precision.HIGHEST,
            kernel_init=nn.with_logical_partitioning(_kernel_init, ("conv_in", "conv_out")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        )
        nn.share_scope(self, dense)
        return dense(h_BxTxHxWxC)


class RmsNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * scale over the channels, in float32."""

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        channels = h_BxTxHxWxC.shape[-1]
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",)), (channels,)
        )
        h = h_BxTxHxWxC.astype(jnp.float32)
        squared_norm = jnp.sum(h * h, axis=-1, keepdims=True)
        # The bound is inside the root: the gradient at h = 0 is then 0, not NaN.
        h = h * lax.rsqrt(jnp.maximum(squared_norm, 1e-24)) * (channels**0.5 * scale)
        return h.astype(h_BxTxHxWxC.dtype)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input (projected where the width changes)."""

    conv: type[nn.Module]
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        residual = h_BxTxHxWxC
        h = nn.silu(RmsNorm(name="norm1")(h_BxTxHxWxC))
        h = self.conv(self.features, self.dtype, name="conv1")(h)
        h = nn.silu(RmsNorm(name="norm2")(h))
        h = self.conv(self.features, self.dtype, name="conv2")(h)
        if residual.shape[-1] != self.features:
            residual = Pointwise(self.features, self.dtype, name="shortcut")(residual)
        return h + residual


class Attention(nn.Module):
    """Single-head attention over the places of a clip, plus the input."""

    attend: Attend
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        batch, frames, height, width, channels = h_BxTxHxWxC.shape
        h = RmsNorm(name="norm")(h_BxTxHxWxC).reshape(batch, frames, height * width, channels)
        query, key, value = (
            Pointwise(channels, self.dtype, name=name)(h) for name in ("query", "key", "value")
        )
        h = self.attend(query, key, value).reshape(h_BxTxHxWxC.shape)
        return h_BxTxHxWxC + Pointwise(channels, self.dtype, name="out")(h)


class MidBlock(nn.Module):
    """Resnet, attention, resnet."""

    conv: type[nn.Module]
    attend: Attend
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, h_BxTxHxWxC: jax.Array) -> jax.Array:
        channels = h_BxTxHxWxC.shape[-1]
        h = ResnetBlock(self.conv, channels, self.dtype, name="resnet_0")(h_BxTxHxWxC)
        h = Attention(self.attend, self.dtype, name="attention")(h)
        return ResnetBlock(self.conv, channels, self.dtype, name="resnet_1")(h)
