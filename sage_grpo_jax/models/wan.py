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

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.models import layer_stack, lora
from sage_grpo_jax.models.layers import (
    Mlp,
    Modulation,
    VectorEmbed,
    constrain,
    float32_dense,
    layer_norm,
    logical_names,
    mesh_axis_size,
    normal,
    sinusoid,
    xavier,
    zeros,
)
from sage_grpo_jax.models.model_config import require, require_shape
from sage_grpo_jax.models.patches import PatchEmbed, unpatchify
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
    boxed = jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0))
    return logical_names(boxed)


def velocity(
    params: dict[str, Any],
    latents: jax.Array,
    timestep: jax.Array,
    condition: Condition,
    config: WanConfig,
    adapters: Any = None,
    scale: float = 1.0,
) -> jax.Array:
    """The model's velocity dz/dsigma (noise minus clean latents).

    Args:
      params: as from `init_params`.
      latents: noisy latents [B, T, H, W, in_channels].
      timestep: float [B], 1000 * sigma.
      condition: see `Condition`.
      config: static.
      adapters: LoRA adapters as from `models.lora.init_adapters`, or None.
      scale: of the adapters, `LoraConfig.scale`.

    Returns:
      float32 [B, T, H, W, out_channels].

    Raises:
      ValueError: shapes that do not fit the config.
    """
    _check_inputs(latents, timestep, condition, config)
    blocks = None
    if adapters is not None:
        params, blocks = lora.split_blocks(params, adapters, scale)
    return _Transformer(config).apply(
        {"params": params}, latents, timestep, condition, blocks, scale
    )


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
        grid = _token_grid(latents_BxTxHxWxC, config)

        # Time and text
        vector = VectorEmbed(width, name="time_embed")(sinusoid(timestep_B, config.freq_dim))
        modulation = Modulation(6, width, xavier, name="time_proj")(vector)
        text = jnp.where(condition.text_mask[:, :, None], condition.text, 0).astype(dtype)
        text = Mlp(width, width, gelu, dtype, normal, name="text_embed")(text)
        text = constrain(text, "batch", None, None)

        # Image tokens. Sharded over `context`, they must come out even: padding under the mask.
        image = PatchEmbed(config.patch, width, dtype, name="patch_embed")(latents_BxTxHxWxC)
        num_tokens = image.shape[1]
        padding = -num_tokens % mesh_axis_size("context")
        image = constrain(jnp.pad(image, ((0, 0), (0, padding), (0, 0))), "batch", "tokens", None)
        mask = None
        if padding:
            mask = jnp.broadcast_to(jnp.arange(image.shape[1]) < num_tokens, image.shape[:2])
        rope = float64_rotary_tables(grid, config.rope_axes_dim, ROPE_THETA, image.shape[1])
        rope = tuple(constrain(table, "tokens", None) for table in rope)

        # Blocks
        shared = (text, jnp.concatenate(modulation, axis=1), mask, rope)

        def block(params, x):
            return Block(config, parent=None).apply({"params": params}, x, *shared)[0]

        if self.is_initializing():
            self._init_blocks(image, *shared)
        else:
            image = layer_stack.run(
                block,
                image,
                self.variables["params"]["blocks"],
                remat=config.remat,
                unroll=config.unroll,
                adapters=adapters,
                scale=scale,
            )
        out = _FinalLayer(config, name="final")(image[:, :num_tokens], vector)
        return unpatchify(out, grid, config.patch)

    def _init_blocks(self, image: jax.Array, *shared: Any) -> None:
        """Makes the parameters of the blocks, stacked on a leading axis."""
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * len(shared),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks(self.config, name="blocks")(image, *shared)


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


def _token_grid(latents_BxTxHxWxC: jax.Array, config: WanConfig) -> tuple[int, int, int]:
    return tuple(n // p for n, p in zip(latents_BxTxHxWxC.shape[1:4], config.patch, strict=True))


def _check_inputs(
    latents: jax.Array, timestep: jax.Array, condition: Condition, config: WanConfig
) -> None:
    chex.assert_rank([latents, timestep, condition.text, condition.text_mask], [5, 1, 3, 2])
    most = config.rope_max_seq_len
    for size, patch, axis in zip(latents.shape[1:4], config.patch, "THW", strict=True):
        name = f"latents axis {axis}"
        require(size % patch == 0, name, size, f"a multiple of the patch {patch}")
        require(size // patch <= most, name, size, f"at most {most} patches (rope_max_seq_len)")
    batch = latents.shape[0]
    require_shape("latents", latents, (*latents.shape[:4], config.in_channels))
    require_shape("timestep", timestep, (batch,))
    require_shape("condition.text", condition.text, (batch, None, config.text_dim))
    require_shape("condition.text_mask", condition.text_mask, condition.text.shape[:2])
