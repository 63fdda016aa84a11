"""Latents to tokens and back: patches that do not overlap, tokens in t-major order."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.models.layers import constrain, mesh_axis_size, xavier, zeros

Grid = tuple[int, int, int]  # along time, height, width


class PatchEmbed(nn.Module):
    """A dense layer over patches. The kernel keeps the layout of a 3-D convolution.

    It is for latents of `channels`. The last ones may be absent, which counts as zeros: their part
    of the kernel is left out of the product.
    """

    patch: Grid
    channels: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, latents_BxTxHxWxC: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(_dense_init, (None, None, None, "conv_in", "embed")),
            (*self.patch, self.channels, self.features),
        )
        bias = self.param("bias", nn.with_logical_partitioning(zeros, (None,)), (self.features,))

        given = latents_BxTxHxWxC.shape[-1]
        tokens = patchify(latents_BxTxHxWxC, self.patch).astype(self.dtype)
        kernel = kernel[..., :given, :].reshape(-1, self.features).astype(self.dtype)
        return tokens @ kernel + bias.astype(self.dtype)


def patchify(x_BxTxHxWxC: jax.Array, patch: Grid) -> jax.Array:
    """[B, T, H, W, C] -> [B, tokens, pt * ph * pw * C]."""
    b, t, h, w, c = x_BxTxHxWxC.shape
    pt, ph, pw = patch
    x = x_BxTxHxWxC.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)


def unpatchify(
    x_BxNxP: jax.Array, grid: Grid, patch: Grid, *, channels_first: bool = False
) -> jax.Array:
    """The inverse of `patchify` on a grid of tokens: [B, tokens, pt * ph * pw * C] -> latents.

    With `channels_first` the numbers of a token lie as [C, pt, ph, pw].
    """
    (t, h, w), (pt, ph, pw) = grid, patch
    channels = x_BxNxP.shape[-1] // math.prod(patch)
    if channels_first:
        x = x_BxNxP.reshape(-1, t, h, w, channels, pt, ph, pw).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    else:
        x = x_BxNxP.reshape(-1, t, h, w, pt, ph, pw, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(-1, t * pt, h * ph, w * pw, channels)


def token_grid(latents_BxTxHxWxC: jax.Array, patch: Grid) -> Grid:
    """How many tokens the latents have along time, height and width."""
    t, h, w = (n // p for n, p in zip(latents_BxTxHxWxC.shape[1:4], patch, strict=True))
    return (t, h, w)


def pad_tokens(x_BxNxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens laid over the `context` axis of the mesh, and a mask of those that were given.

    They have to come out even there: what is missing is padding, [B, N', D] and bool [B, N'].
    """
    count = x_BxNxD.shape[1]
    padding = -count % mesh_axis_size("context")
    x = constrain(jnp.pad(x_BxNxD, ((0, 0), (0, padding), (0, 0))), "batch", "tokens", None)
    return x, jnp.broadcast_to(jnp.arange(count + padding) < count, x.shape[:2])


def _dense_init(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Xavier for a patch kernel, seen as the dense layer that it is."""
    return xavier(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)
