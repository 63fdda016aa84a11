"""The HunyuanVideo-1.5 diffusion transformer: velocity of the latents, given time and text.

Functions on nested dicts of arrays; Flax Linen stays inside. Equal to diffusers'
`HunyuanVideo15Transformer3DModel`, except that text tokens keep their places under a key mask (the
reference moves valid tokens to the front: text has no positions, so the result is the same).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_grpo_jax.models import layer_stack, layers, lora, transformer
from sage_grpo_jax.models.double_stream import EPSILON, Block
from sage_grpo_jax.models.hunyuan_video_condition import (
    Condition,
    embedding_needs,
    make_condition,
    unconditional,
    with_step_end,
)
from sage_grpo_jax.models.hunyuan_video_config import (
    VARIANTS,
    HunyuanVideoConfig,
    released,
)
from sage_grpo_jax.models.layers import (
    Modulation,
    VectorEmbed,
    constrain,
    float32_dense,
    layer_norm,
    normal,
    sinusoid,
    zeros,
)
from sage_grpo_jax.models.model_config import require, require_shape
from sage_grpo_jax.models.patches import PatchEmbed, pad_tokens, token_grid, unpatchify
from sage_grpo_jax.models.rope import rotary_angles, rotary_tables
from sage_grpo_jax.models.text_refiner import ByT5Mapper, ImageProjection, TextRefiner

__all__ = [
    "Condition",
    "HunyuanVideoConfig",
    "embedding_needs",
    "init_params",
    "make_condition",
    "partition_names",
    "unconditional",
    "velocity",
    "with_step_end",
]

NAME, Config = "HunyuanVideo-1.5 DiT", HunyuanVideoConfig
RELEASED = {variant: released(variant) for variant in VARIANTS}
VARIANT_FIELDS = ("use_meanflow",)
_STREAMS = ("image", "text")
# The layer of that name in both streams of the double-stream blocks.
ADAPTER_TARGETS = {
    target: tuple(f"blocks/{stream}/{target}" for stream in _STREAMS) for target in lora.TARGETS
}
# Every dense layer; some are parts that a model may lack.
ADAPTER_LAYERS = (
    *(f"blocks/{stream}/{t}" for stream in _STREAMS for t in (*lora.TARGETS, "modulation/linear")),
    *(f"text_refiner/blocks/{target}" for target in (*lora.TARGETS, "gates/linear")),
    "text_refiner/proj_in",
    *(f"text_refiner/{embed}/{end}" for embed in ("time_embed", "pooled_embed")
      for end in ("in", "out")),
    *(f"{embed}/{end}" for embed in ("time_embed", "time_embed_r", "image_embed")
      for end in ("in", "out")),
    "byt5_embed/in",
    "byt5_embed/mid",
    "byt5_embed/out",
    "final/modulation/linear",
    "final/proj",
)  # fmt: skip

# Rows of the condition-type embedding.
TEXT, BYT5, IMAGE = 0, 1, 2


def init_params(config: HunyuanVideoConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters as a nested dict; works under `jax.eval_shape`.

    Modulation and the last projection start at zero (DiT): every block is the identity at first.
    """
    return nn.unbox(_init_boxed(config, key))


def partition_names(config: HunyuanVideoConfig) -> dict[str, Any]:
    """The tree of `init_params` with a tuple of logical axis names (or None) at each leaf."""
    return layers.partition_names(_init_boxed, config)


def velocity(
    params: dict[str, Any],
    latents: jax.Array,
    timestep: jax.Array,
    condition: Condition,
    config: HunyuanVideoConfig,
    adapters: Any = None,
    scale: float = 1.0,
) -> jax.Array:
    """The velocity dz/dsigma of `door.VideoModel`: float32 [B, T, H, W, out_channels].

    Latents have as many channels; what else the model may see of a clip is in the condition.
    """
    _check_inputs(latents, timestep, condition, config)
    network = _Transformer(config)
    return transformer.velocity(network, params, latents, timestep, condition, adapters, scale)


@functools.partial(jax.jit, static_argnums=0)
def _init_boxed(config: HunyuanVideoConfig, key: jax.Array) -> dict[str, Any]:
    """Parameters in boxes that carry the logical axis names; jit drops the forward pass."""
    # One token of everything, so that optional parts get parameters too. A batch of one fits no
    # sharded kernel, and initialisation needs none.
    config = dataclasses.replace(config, attention="xla")
    latents = jnp.zeros((1, *config.patch, config.out_channels))

    def tokens(width: int | None) -> jax.Array | None:
        return None if width is None else jnp.zeros((1, 1, width))

    condition = Condition(
        text=tokens(config.text_embed_dim),
        text_mask=jnp.ones((1, 1), bool),
        byt5=tokens(config.text_embed_2_dim),
        image=tokens(config.image_embed_dim),
        timestep_r=jnp.zeros(1) if config.use_meanflow else None,
    )
    return _Transformer(config).init(key, latents, jnp.zeros(1), condition)["params"]


class _FinalLayer(nn.Module):
    """Modulated norm and projection to patches; float32."""

    config: HunyuanVideoConfig

    @nn.compact
    def __call__(self, x_BxNxD: jax.Array, vector_BxD: jax.Array) -> jax.Array:
        config = self.config
        # Scale before shift here, unlike in the blocks.
        scale, shift = Modulation(2, config.hidden_size, name="modulation")(vector_BxD)
        x = layer_norm(x_BxNxD, EPSILON) * (1 + scale) + shift
        channels = config.patch_size_t * config.patch_size**2 * config.out_channels
        return float32_dense(channels, ("embed", "conv_out"), init=zeros, name="proj")(x)


class _Transformer(nn.Module):
    config: HunyuanVideoConfig

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
        grid = token_grid(latents_BxTxHxWxC, config.patch)

        # Time and text
        vector = VectorEmbed(config.hidden_size, name="time_embed")(sinusoid(timestep_B))
        if condition.timestep_r is not None:
            embed_r = VectorEmbed(config.hidden_size, name="time_embed_r")
            vector = vector + embed_r(sinusoid(condition.timestep_r))

        text, text_mask = self._text_tokens(condition, timestep_B)

        # Image tokens, absent condition channels are zeros
        if condition.latents is not None:
            latents_BxTxHxWxC = jnp.concatenate([latents_BxTxHxWxC, condition.latents], axis=-1)
        embed = PatchEmbed(
            config.patch, config.in_channels, config.hidden_size, dtype, name="patch_embed"
        )
        image = embed(latents_BxTxHxWxC)
        num_tokens = image.shape[1]
        image, image_mask = pad_tokens(image)
        key_mask = jnp.concatenate([image_mask, text_mask], axis=1)
        angles = rotary_angles(grid, config.rope_axes_dim, config.rope_theta)
        rope = rotary_tables(angles, image.shape[1])
        rope = tuple(constrain(table, "tokens", None) for table in rope)

        # Blocks
        image, _ = layer_stack.blocks(
            self, Block, (image, text), (vector, key_mask, rope), adapters, scale
        )
        out = _FinalLayer(config, name="final")(image[:, :num_tokens], vector)
        return unpatchify(out, grid, config.patch, channels_first=True)

    def _text_tokens(
        self, condition: Condition, timestep_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """All text-side tokens [B, S, D] and their mask [B, S].

        Nothing after this sees their places, so that any order will do.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        type_embed = self.param(
            "cond_type_embed", nn.with_logical_partitioning(normal, (None, "embed")),
            (3, config.hidden_size),
        ).astype(dtype)  # fmt: skip
        refiner = TextRefiner(
            config.num_attention_heads,
            config.attention_head_dim,
            config.num_refiner_layers,
            dtype,
            config.attention,
            config.remat,
            name="text_refiner",
        )
        tokens = [refiner(condition.text, condition.text_mask, timestep_B) + type_embed[TEXT]]
        masks = [condition.text_mask]

        if condition.byt5 is not None:
            mapper = ByT5Mapper(config.hidden_size, dtype, name="byt5_embed")
            tokens.append(mapper(condition.byt5) + type_embed[BYT5])
            mask = condition.byt5_mask
            masks.append(jnp.ones(condition.byt5.shape[:2], bool) if mask is None else mask)

        if condition.image is not None:
            projection = ImageProjection(config.hidden_size, dtype, name="image_embed")
            tokens.append(projection(condition.image) + type_embed[IMAGE])
            mask = condition.image_mask
            if mask is None:
                # Zeros are no image, as in diffusers, which asks whether the whole batch is zero.
                given = jnp.any(condition.image != 0, axis=(1, 2))
                mask = jnp.broadcast_to(given[:, None], condition.image.shape[:2])
            masks.append(mask)

        return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1).astype(bool)


def _check_inputs(
    latents: jax.Array, timestep: jax.Array, condition: Condition, config: HunyuanVideoConfig
) -> None:
    transformer.check_inputs(
        latents, timestep, condition.text, condition.text_mask, config, config.text_embed_dim
    )

    # A part may be absent; where it is there, the model must be one that can take it.
    batch = latents.shape[0]
    for name, width in (("byt5", config.text_embed_2_dim), ("image", config.image_embed_dim)):
        value, mask = getattr(condition, name), getattr(condition, f"{name}_mask")
        if value is None:
            require(mask is None, f"condition.{name}_mask", "given", f"None without {name}")
            continue
        require(
            width is not None, f"condition.{name}", "given", "None: the model has no part for it"
        )
        require_shape(f"condition.{name}", value, (batch, None, width))
        if mask is not None:
            require_shape(f"condition.{name}_mask", mask, value.shape[:2])

    if condition.latents is not None:
        extra = config.in_channels - config.out_channels
        require_shape("condition.latents", condition.latents, (*latents.shape[:4], extra))
    if condition.timestep_r is not None:
        require(config.use_meanflow, "condition.timestep_r", "given", "None without use_meanflow")
        require_shape("condition.timestep_r", condition.timestep_r, (batch,))
