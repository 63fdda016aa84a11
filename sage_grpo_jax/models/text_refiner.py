"""The text side of the DiT: token refiner, ByT5 mapper, vision projection.

Layer by layer as in diffusers `transformer_hunyuan_video15.py`, which agrees with the official
code.
"""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.models.attention import attention
from sage_grpo_jax.models.layers import (
    HIGHEST,
    LayerNorm,
    Mlp,
    Modulation,
    VectorEmbed,
    dense,
    sinusoid,
)

REFINER_MLP_RATIO = 4  # fixed in every released model
BYT5_HIDDEN = 2048  # likewise


class RefinerBlock(nn.Module):
    """Self-attention and MLP over text tokens; the conditioning vector gives gates only."""

    heads: int
    head_size: int
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, vector_BxD: jax.Array, mask_BxL: jax.Array
    ) -> tuple[jax.Array, None]:
        batch, length, width = x_BxLxD.shape
        gate_attention, gate_mlp = Modulation(2, width, name="gates")(vector_BxD)

        normed = LayerNorm(1e-6, self.dtype, name="norm1")(x_BxLxD)
        query, key, value = (
            dense(width, ("embed", "heads"), self.dtype, name=name)(normed).reshape(
                batch, length, self.heads, self.head_size
            )
            for name in ("query", "key", "value")
        )
        out = attention(query * self.head_size**-0.5, key, value, mask_BxL, self.attention)
        out = dense(width, ("heads", "embed"), self.dtype, name="proj")(
            out.reshape(batch, length, width)
        )
        x = (x_BxLxD + gate_attention * out).astype(self.dtype)

        normed = LayerNorm(1e-6, self.dtype, name="norm2")(x)
        out = Mlp(REFINER_MLP_RATIO * width, width, nn.silu, self.dtype, name="mlp")(normed)
        return (x + gate_mlp * out).astype(self.dtype), None


class TextRefiner(nn.Module):
    """Projects text embeddings to the model width and refines them given time and pooled text."""

    heads: int
    head_size: int
    num_layers: int
    dtype: jnp.dtype
    attention: str
    remat: bool

    @nn.compact
    def __call__(
        self, text_BxLxE: jax.Array, mask_BxL: jax.Array, timestep_B: jax.Array
    ) -> jax.Array:
        """Returns [B, L, D]; rows where the mask is False are finite and meaningless."""
        chex.assert_rank([text_BxLxE, mask_BxL, timestep_B], [3, 2, 1])
        width = self.heads * self.head_size
        # Samples without text pool to zero instead of 0 / 0.
        weights = mask_BxL.astype(jnp.float32)
        pooled = jnp.einsum(
            "ble,bl->be", text_BxLxE.astype(jnp.float32), weights, precision=HIGHEST
        )
        pooled = pooled / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        vector = VectorEmbed(width, name="time_embed")(sinusoid(timestep_B))
        vector = vector + VectorEmbed(width, name="pooled_embed")(pooled)

        x = dense(width, (None, "embed"), self.dtype, name="proj_in")(text_BxLxE)
        block = RefinerBlock
        if self.remat:
            block = nn.remat(block, prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(self.heads, self.head_size, self.dtype, self.attention, name="blocks")(
            x, vector, mask_BxL
        )
        return x


class ByT5Mapper(nn.Module):
    """Maps ByT5 embeddings of quoted text to the model width: [B, L, E] -> [B, L, D]."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = LayerNorm(1e-5, self.dtype, name="norm")(x)
        x = dense(BYT5_HIDDEN, (None, "embed"), self.dtype, name="in")(x)
        x = dense(BYT5_HIDDEN, ("embed", "mlp"), self.dtype, name="mid")(_gelu(x))
        return dense(self.features, ("mlp", "embed"), self.dtype, name="out")(_gelu(x))


class ImageProjection(nn.Module):
    """Maps embeddings of a vision encoder to the model width: [B, N, E] -> [B, N, D]."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = LayerNorm(1e-5, self.dtype, name="norm_in")(x)
        x = dense(channels, (None, "mlp"), self.dtype, name="in")(x)
        x = dense(self.features, ("mlp", "embed"), self.dtype, name="out")(_gelu(x))
        return LayerNorm(1e-5, self.dtype, name="norm_out")(x)


def _gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=False)
