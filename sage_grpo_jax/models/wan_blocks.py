"""The blocks of the Wan DiT: self-attention, attention to the text, MLP."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.models.attention import Qkv, cross_attention, self_attention
from sage_grpo_jax.models.layers import LayerNorm, Mlp, RMSNorm, constrain, dense, layer_norm
from sage_grpo_jax.models.rope import apply_rotary
from sage_grpo_jax.models.wan_config import WanConfig

gelu = functools.partial(nn.gelu, approximate=True)


class Block(nn.Module):
    """Attention among image tokens, attention to text tokens, MLP; the second is not modulated."""

    config: WanConfig

    @nn.compact
    def __call__(
        self,
        x_BxNxD: jax.Array,
        text_BxLxD: jax.Array,
        modulation_Bx6xD: jax.Array,
        key_mask_BxN: jax.Array | None,
        rope: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, None]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x, table = x_BxNxD, ModulationTable(6, name="modulation")
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table(modulation_Bx6xD)

        # Image tokens among themselves
        attention = _Attention(config, name="self_attention")
        normed = (layer_norm(x, config.eps) * (1 + scale) + shift).astype(dtype)
        query, key = (
            apply_rotary(part, *rope).astype(dtype)
            for part in (attention.queries(normed), attention.keys(normed))
        )
        qkv = Qkv(query, key, attention.values(normed))
        attended = self_attention(qkv, key_mask_BxN, config.attention)
        x = (x + gate * attention.out(attended)).astype(dtype)

        # Image tokens to text tokens: no positions, no mask
        attention = _Attention(config, name="cross_attention")
        normed = x
        if config.cross_attn_norm:
            normed = LayerNorm(config.eps, dtype, name="cross_norm")(x)
        query, key = attention.queries(normed), attention.keys(text_BxLxD)
        value = attention.values(text_BxLxD)
        attended = cross_attention(query.astype(dtype), key.astype(dtype), value, config.attention)
        x = x + attention.out(attended)

        # MLP
        normed = (layer_norm(x, config.eps) * (1 + mlp_scale) + mlp_shift).astype(dtype)
        out = Mlp(config.ffn_dim, config.hidden_size, gelu, dtype, name="mlp")(normed)
        x = (x + mlp_gate * out).astype(dtype)
        return constrain(x, "batch", "tokens", None), None


class ModulationTable(nn.Module):
    """Learned rows that are added to what the timestep gives: `count` arrays [B, 1, D], float32."""

    count: int

    @nn.compact
    def __call__(self, vectors: jax.Array) -> list[jax.Array]:
        """`vectors`: float32 [B, count, D], or [B, 1, D], the same for all rows."""
        width = vectors.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), (None,) * 3)
        table = self.param("table", init, (1, self.count, width)).astype(jnp.float32)
        return jnp.split(table + vectors, self.count, axis=1)


class _Attention(nn.Module):
    """The dense layers and norms around an attention; heads are split here and joined there."""

    config: WanConfig

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.hidden_size
        self.query = dense(width, ("embed", "heads"), dtype)
        self.key = dense(width, ("embed", "heads"), dtype)
        self.value = dense(width, ("embed", "heads"), dtype)
        self.query_norm = RMSNorm(config.eps)
        self.key_norm = RMSNorm(config.eps)
        self.proj = dense(width, ("heads", "embed"), dtype)

    def queries(self, x_BxNxD: jax.Array) -> jax.Array:
        """[B, N, heads, head_dim], normalised over all heads together, scaled; float32."""
        scale = self.config.attention_head_dim**-0.5
        return self._heads(self.query_norm(self.query(x_BxNxD), scale))

    def keys(self, x_BxNxD: jax.Array) -> jax.Array:
        """[B, N, heads, head_dim], normalised over all heads together; float32."""
        return self._heads(self.key_norm(self.key(x_BxNxD)))

    def values(self, x_BxNxD: jax.Array) -> jax.Array:
        """[B, N, heads, head_dim]."""
        return self._heads(self.value(x_BxNxD))

    def out(self, x_BxNxD: jax.Array) -> jax.Array:
        """What the residual stream gets of the attended values."""
        return self.proj(x_BxNxD)

    def _heads(self, x_BxNxD: jax.Array) -> jax.Array:
        config = self.config
        return x_BxNxD.reshape(
            *x_BxNxD.shape[:2], config.num_attention_heads, config.attention_head_dim
        )
