"""The HunyuanVideo-1.5 diffusion transformer: velocity of the latents, given time and text.

Functions on nested dicts of arrays; Flax Linen stays inside. Equal to diffusers'
`HunyuanVideo15Transformer3DModel`, except that text tokens keep their places under a key mask (the
reference moves valid tokens to the front: text has no positions, so the result is the same).
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

from sage_grpo_jax.models import double_stream, lora
from sage_grpo_jax.models.double_stream import EPSILON
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
    logical_names,
    mesh_axis_size,
    normal,
    sinusoid,
    xavier,
    zeros,
)
from sage_grpo_jax.models.model_config import require, require_shape
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
    boxed = jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0))
    return logical_names(boxed)


def velocity(
    params: dict[str, Any],
    latents: jax.Array,
    timestep: jax.Array,
    condition: Condition,
    config: HunyuanVideoConfig,
    adapters: Any = None,
    scale: float = 1.0,
) -> jax.Array:
    """The model's velocity dz/dsigma (noise minus clean latents).

    Args:
      params: as from `init_params`.
      latents: noisy latents [B, T, H, W, out_channels].
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


class _PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens. The kernel keeps the layout of a 3-D convolution.

    Absent condition channels are zeros: their part of the kernel is left out of the product.
    """

    config: HunyuanVideoConfig

    @nn.compact
    def __call__(self, latents_BxTxHxWxC: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        patch, width = config.patch, config.hidden_size

        names = (None, None, None, "conv_in", "embed")
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(_xavier_of_patches, names),
            (*patch, config.in_channels, width),
        )
        bias = self.param("bias", nn.with_logical_partitioning(zeros, (None,)), (width,))
        channels = latents_BxTxHxWxC.shape[-1]
        tokens = patchify(latents_BxTxHxWxC, patch).astype(dtype)
        kernel = kernel[..., :channels, :].reshape(-1, width).astype(dtype)
        return tokens @ kernel + bias.astype(dtype)


def _xavier_of_patches(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Xavier for a patch kernel, seen as the dense layer that it is."""
    return xavier(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


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
        config = self.config
        grid = tuple(
            n // p for n, p in zip(latents_BxTxHxWxC.shape[1:4], config.patch, strict=True)
        )
        vector = VectorEmbed(config.hidden_size, name="time_embed")(sinusoid(timestep_B))
        if condition.timestep_r is not None:
            embed_r = VectorEmbed(config.hidden_size, name="time_embed_r")
            vector = vector + embed_r(sinusoid(condition.timestep_r))

        text, text_mask = self._text_tokens(condition, timestep_B)
        if condition.latents is not None:
            latents_BxTxHxWxC = jnp.concatenate([latents_BxTxHxWxC, condition.latents], axis=-1)
        image = _PatchEmbed(config, name="patch_embed")(latents_BxTxHxWxC)
        num_tokens = image.shape[1]
        # Sharded over `context`, tokens must come out even; the rest is padding under the mask.
        padding = -num_tokens % mesh_axis_size("context")
        image = jnp.pad(image, ((0, 0), (0, padding), (0, 0)))
        image = constrain(image, "batch", "tokens", None)
        image_mask = jnp.broadcast_to(
            jnp.arange(num_tokens + padding) < num_tokens, image.shape[:2]
        )
        key_mask = jnp.concatenate([image_mask, text_mask], axis=1)
        rope = rotary_tables(
            rotary_angles(grid, config.rope_axes_dim, config.rope_theta), num_tokens + padding
        )
        rope = tuple(constrain(table, "tokens", None) for table in rope)

        shared = (vector, key_mask, rope)
        if self.is_initializing():
            self._init_blocks((image, text), *shared)
        else:
            blocks = self.variables["params"]["blocks"]
            image, text = double_stream.run_blocks(
                blocks, config, (image, text), shared, adapters, scale
            )
        out = _FinalLayer(config, name="final")(image[:, :num_tokens], vector)
        return unpatchify(out, grid, config.patch)

    def _text_tokens(
        self, condition: Condition, timestep_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """All text-side tokens [B, S, D] and their mask [B, S]."""
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
                given = jnp.any(condition.image != 0, axis=(1, 2))
                mask = jnp.broadcast_to(given[:, None], condition.image.shape[:2])
            masks.append(mask)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1).astype(bool)

    def _init_blocks(self, carry: tuple[jax.Array, jax.Array], *shared: Any) -> None:
        """Makes the parameters of the blocks, stacked on a leading axis."""
        blocks = nn.scan(
            double_stream.Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * len(shared),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks(self.config, name="blocks")(carry, *shared)


def patchify(x_BxTxHxWxC: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """[B, T, H, W, C] -> [B, tokens, pt * ph * pw * C], tokens in t-major order."""
    b, t, h, w, c = x_BxTxHxWxC.shape
    pt, ph, pw = patch
    x = x_BxTxHxWxC.reshape(b, t // pt, pt, h // ph, ph, w // pw, pw, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)


def unpatchify(
    x_BxNxP: jax.Array, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> jax.Array:
    """[B, tokens, C * pt * ph * pw] -> [B, T, H, W, C]; channels lead in a token, unlike above."""
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x_BxNxP.reshape(-1, t, h, w, x_BxNxP.shape[-1] // (pt * ph * pw), pt, ph, pw)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(-1, t * pt, h * ph, w * pw, x.shape[-1])


def _check_inputs(latents, timestep, condition: Condition, config: HunyuanVideoConfig) -> None:
    chex.assert_rank([latents, timestep, condition.text, condition.text_mask], [5, 1, 3, 2])
    batch = latents.shape[0]
    for size, patch, axis in zip(latents.shape[1:4], config.patch, "THW", strict=True):
        require(size % patch == 0, f"latents axis {axis}", size, f"a multiple of the patch {patch}")
    require_shape("latents", latents, (*latents.shape[:4], config.out_channels))
    require_shape("timestep", timestep, (batch,))
    require_shape("condition.text", condition.text, (batch, None, config.text_embed_dim))
    require_shape("condition.text_mask", condition.text_mask, condition.text.shape[:2])
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
