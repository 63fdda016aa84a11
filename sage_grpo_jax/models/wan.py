"""The Wan 2.1 text-to-video diffusion transformer: velocity of the latents, given time and text.

Functions on nested dicts of arrays; Flax Linen stays inside. Equal to diffusers'
`WanTransformer3DModel` in float32. In bfloat16 the projection of the time embedding and the last
projection stay float32, as in the official code (`wan/modules/model.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.models import layer_stack, layers, transformer
from sage_grpo_jax.models.layers import (
    Mlp,
    Modulation,
    VectorEmbed,
    constrain,
    float32_dense,
    layer_norm,
    normal,
    sinusoid,
    xavier,
    zeros,
)
from sage_grpo_jax.models.model_config import require
from sage_grpo_jax.models.patches import PatchEmbed, pad_tokens, token_grid, unpatchify
from sage_grpo_jax.models.rope import float64_rotary_tables
from sage_grpo_jax.models.wan_blocks import Block, ModulationTable, gelu
from sage_grpo_jax.models.wan_condition import (
    Condition,
    embedding_needs,
    make_condition,
    unconditional,
    with_step_end,
)
from sage_grpo_jax.models.wan_config import ROPE_THETA, VARIANTS, WanConfig

__all__ = [
    "Condition",
    "WanConfig",
    "embedding_needs",
    "init_params",
    "make_condition",
    "partition_names",
    "unconditional",
    "velocity",
    "with_step_end",
]

NAME, Config = "Wan 2.1 DiT", WanConfig
RELEASED = VARIANTS
# Shapes depend on them, and they tell the released models apart before any weights are read.
VARIANT_FIELDS = ("num_attention_heads", "num_layers")
_ATTENTIONS = ("self_attention", "cross_attention")
# What LoRA adapts for each target: the layer of that name in both attentions, and in the MLP.
ADAPTER_TARGETS: dict[str, tuple[str, ...]] = {
    **{
        name: tuple(f"blocks/{attention}/{name}" for attention in _ATTENTIONS)
        for name in ("query", "key", "value", "proj")
    },
    "mlp/in": ("blocks/mlp/in",),
    "mlp/out": ("blocks/mlp/out",),
}
# Every dense layer of the model.
ADAPTER_LAYERS: tuple[str, ...] = (
    *(path for paths in ADAPTER_TARGETS.values() for path in paths),
    *(f"{embed}/{end}" for embed in ("time_embed", "text_embed") for end in ("in", "out")),
    "time_proj/linear",
    "final/proj",
)


def init_params(config: WanConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters as a nested dict; works under `jax.eval_shape`.

    The last projection starts at zero, and with it the velocity, as in the official code.
    """
    return nn.unbox(_init_boxed(config, key))


def partition_names(config: WanConfig) -> dict[str, Any]:
    """The tree of `init_params` with a tuple of logical axis names (or None) at each leaf."""
    return layers.partition_names(_init_boxed, config)


def velocity(
    params: dict[str, Any],
    latents: jax.Array,
    timestep: jax.Array,
    condition: Condition,
    config: WanConfig,
    adapters: Any = None,
    scale: float = 1.0,
) -> jax.Array:
    """The velocity dz/dsigma of `door.VideoModel`: float32 [B, T, H, W, out_channels]."""
    _check_inputs(latents, timestep, condition, config)
    network = _Transformer(config)
    return transformer.velocity(network, params, latents, timestep, condition, adapters, scale)


@functools.partial(jax.jit, static_argnums=0)
def _init_boxed(config: WanConfig, key: jax.Array) -> dict[str, Any]:
    """Parameters in boxes that carry the logical axis names; jit drops the forward pass."""
    # A batch of one fits no sharded kernel, and initialisation needs none.
    config = dataclasses.replace(config, attention="xla")
    latents = jnp.zeros((1, *config.patch, config.in_channels))
    condition = Condition(jnp.zeros((1, 1, config.text_dim)), jnp.ones((1, 1), bool))
    return _Transformer(config).init(key, latents, jnp.zeros(1), condition)["params"]


class _Transformer(nn.Module):
    config: WanConfig

    @nn.compact
    def __call__(
        self,
        latents_BxTxHxWxC: jax.Array,
        timestep_B: jax.Array,
        condition: Condition,
        adapters: Any = None,
        scale: float = 1.0,
    ) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.hidden_size
        grid = token_grid(latents_BxTxHxWxC, config.patch)

        # Time and text
        vector = VectorEmbed(width, name="time_embed")(sinusoid(timestep_B, config.freq_dim))
        modulation = Modulation(6, width, xavier, name="time_proj")(vector)
        text = jnp.where(condition.text_mask[:, :, None], condition.text, 0).astype(dtype)
        text = Mlp(width, width, gelu, dtype, normal, name="text_embed")(text)
        text = constrain(text, "batch", None, None)

        # Image tokens
        embed = PatchEmbed(config.patch, config.in_channels, width, dtype, name="patch_embed")
        image = embed(latents_BxTxHxWxC)
        num_tokens = image.shape[1]
        image, mask = pad_tokens(image)
        rope = float64_rotary_tables(grid, config.rope_axes_dim, ROPE_THETA, image.shape[1])
        rope = tuple(constrain(table, "tokens", None) for table in rope)

        # Blocks
        padded = image.shape[1] > num_tokens
        shared = (text, jnp.concatenate(modulation, axis=1), mask if padded else None, rope)
        image = layer_stack.blocks(self, Block, image, shared, adapters, scale)
        out = _FinalLayer(config, name="final")(image[:, :num_tokens], vector)
        return unpatchify(out, grid, config.patch)


class _FinalLayer(nn.Module):
    """Modulated norm and projection to patches; float32."""

    config: WanConfig

    @nn.compact
    def __call__(self, x_BxNxD: jax.Array, vector_BxD: jax.Array) -> jax.Array:
        config = self.config
        shift, scale = ModulationTable(2, name="modulation")(vector_BxD[:, None, :])
        x = layer_norm(x_BxNxD, config.eps) * (1 + scale) + shift
        channels = math.prod(config.patch) * config.out_channels
        return float32_dense(channels, ("embed", "conv_out"), init=zeros, name="proj")(x)


def _check_inputs(
    latents: jax.Array, timestep: jax.Array, condition: Condition, config: WanConfig
) -> None:
    transformer.check_inputs(
        latents, timestep, condition.text, condition.text_mask, config, config.text_dim
    )
    most = config.rope_max_seq_len
    for size, patch, axis in zip(latents.shape[1:4], config.patch, "THW", strict=True):
        allowed = f"at most {most} patches (rope_max_seq_len)"
        require(size // patch <= most, f"latents axis {axis}", size, allowed)
