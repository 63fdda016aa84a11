"""The double-stream blocks of the HunyuanVideo-1.5 DiT."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.models.attention import Qkv, joint_attention
from sage_grpo_jax.models.hunyuan_video_config import HunyuanVideoConfig
from sage_grpo_jax.models.layers import Mlp, Modulation, RMSNorm, constrain, dense, layer_norm
from sage_grpo_jax.models.rope import apply_rotary

EPSILON = 1e-6


class Stream(nn.Module):
    """The image or the text half of a double-stream block."""

    config: HunyuanVideoConfig

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.hidden_size
        self.modulation = Modulation(6, width)
        self.query = dense(width, ("embed", "heads"), dtype)
        self.key = dense(width, ("embed", "heads"), dtype)
        self.value = dense(width, ("embed", "heads"), dtype)
        self.query_norm = RMSNorm(EPSILON)
        self.key_norm = RMSNorm(EPSILON)
        self.proj = dense(width, ("heads", "embed"), dtype)
        gelu = functools.partial(nn.gelu, approximate=True)
        self.mlp = Mlp(int(width * config.mlp_ratio), width, gelu, dtype)

    def modulate(self, vector_BxD: jax.Array) -> tuple[jax.Array, ...]:
        """shift, scale, gate of attention, then of the MLP; float32 [B, 1, D] each."""
        return self.modulation(vector_BxD)

    def qkv(
        self,
        x_BxNxD: jax.Array,
        modulation: tuple[jax.Array, ...],
        rope: tuple[jax.Array, jax.Array] | None = None,
    ) -> Qkv:
        """Queries (scaled), keys and values [B, N, heads, head_dim]; `rope`: (cos, sin) tables."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        shift, scale = modulation[:2]
        x = (layer_norm(x_BxNxD, EPSILON) * (1 + scale) + shift).astype(dtype)
        shape = (*x.shape[:2], config.num_attention_heads, config.attention_head_dim)
        query = self.query_norm(self.query(x).reshape(shape), config.attention_head_dim**-0.5)
        key = self.key_norm(self.key(x).reshape(shape))
        if rope is not None:
            query, key = apply_rotary(query, *rope), apply_rotary(key, *rope)
        return Qkv(query.astype(dtype), key.astype(dtype), self.value(x).reshape(shape))

    def update(
        self, x_BxNxD: jax.Array, attended_BxNxD: jax.Array, modulation: tuple[jax.Array, ...]
    ) -> jax.Array:
        """Residual updates by attention, then by the MLP."""
        dtype = jnp.dtype(self.config.dtype)
        gate_attention, shift, scale, gate_mlp = modulation[2:]
        x = (x_BxNxD + gate_attention * self.proj(attended_BxNxD)).astype(dtype)
        normed = (layer_norm(x, EPSILON) * (1 + scale) + shift).astype(dtype)
        return (x + gate_mlp * self.mlp(normed)).astype(dtype)


class Block(nn.Module):
    """A double-stream block: joint attention, everything else per stream."""

    config: HunyuanVideoConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array],
        vector_BxD: jax.Array,
        key_mask_BxS: jax.Array | None,
        rope: tuple[jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        image_BxNxD, text_BxLxD = carry
        image_stream = Stream(self.config, name="image")
        text_stream = Stream(self.config, name="text")
        image_modulation = image_stream.modulate(vector_BxD)
        text_modulation = text_stream.modulate(vector_BxD)
        image_attended, text_attended = joint_attention(
            image_stream.qkv(image_BxNxD, image_modulation, rope),
            text_stream.qkv(text_BxLxD, text_modulation),
            key_mask_BxS,
            self.config.attention,
        )
        image = image_stream.update(image_BxNxD, image_attended, image_modulation)
        text = text_stream.update(text_BxLxD, text_attended, text_modulation)
        return (
            constrain(image, "batch", "tokens", None),
            constrain(text, "batch", None, None),
        ), None
