"""Attention with a key mask: one function, three implementations.

- "splash": the Pallas TPU kernel, inside `jax.shard_map`; the mask travels as segment ids.
- "cudnn": fused attention on NVIDIA GPUs (bfloat16 or float16).
- "xla": plain einsums, everywhere.

Parallelism over tokens is Ulysses: image tokens are sharded over the `context` mesh axis outside of
attention and heads inside, so XLA inserts one all-to-all on each side. Image tokens that attend to
text alone (`cross_attention`) stay where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from sage_grpo_jax.models.layers import constrain, current_platform, mesh_axes, mesh_axis_size

IMPLEMENTATIONS = ("auto", "splash", "cudnn", "xla")
LANES = 128  # the TPU's vector width: splash wants head and block sizes in multiples of it
MAX_BLOCK = 512
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: an all-masked row must not be NaN


class Qkv(NamedTuple):
    """Queries (already scaled by head_size**-0.5), keys and values, each [B, S, H, D]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def joint_attention(
    image: Qkv, text: Qkv, key_mask_BxS: jax.Array | None, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Attention over [image | text]; returns both parts, [B, N, H*D] and [B, L, H*D].

    Args:
      image: image tokens, sharded over `context` where the mesh has that axis.
      text: text tokens.
      key_mask_BxS: bool [B, N + L], True where a key may be attended to; None for all.
      implementation: one of IMPLEMENTATIONS.

    Raises:
      ValueError: the context axis of the mesh does not divide the head count, or the
        implementation cannot run these shapes.
    """
    num_image = image.query.shape[1]
    # Token-sharded to head-sharded before concatenating: text then joins without communication.
    image = _tokens_to_heads(image)
    text = jax.tree.map(lambda x: constrain(x, "batch", None, "heads", None), text)
    query, key, value = (jnp.concatenate(pair, axis=1) for pair in zip(image, text, strict=True))
    out = attention(query, key, value, key_mask_BxS, implementation)
    out = constrain(out, "batch", None, "heads", None)
    text_out = out[:, num_image:]
    return _heads_to_tokens(out[:, :num_image]), text_out.reshape(*text_out.shape[:2], -1)


def self_attention(
    image: Qkv, key_mask_BxN: jax.Array | None, implementation: str = "auto"
) -> jax.Array:
    """Attention among image tokens alone: [B, N, H*D]; see `joint_attention`."""
    out = attention(*_tokens_to_heads(image), key_mask_BxN, implementation)
    return _heads_to_tokens(out)


def cross_attention(
    image_BxNxHxD: jax.Array,
    text_key_BxLxHxD: jax.Array,
    text_value_BxLxHxD: jax.Array,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of image tokens to all text tokens: [B, N, H*D].

    Every device keeps its own image tokens and sees the whole text, so nothing is exchanged.

    Args:
      image_BxNxHxD: scaled queries, sharded over `context` where the mesh has that axis.
      text_key_BxLxHxD: keys of the text.
      text_value_BxLxHxD: values of the text.
      implementation: one of IMPLEMENTATIONS.
    """
    batch, num_image, _, head_size = image_BxNxHxD.shape
    # Resolved out here: inside, the mesh no longer says what its devices are.
    implementation = resolve(implementation, head_size, image_BxNxHxD.dtype)
    function = functools.partial(attention, implementation=implementation)

    # The kernels do not know a query axis that is sharded, so they get each device's own part.
    batch_axes, token_axes = (
        axes if size % mesh_axis_size(*axes) == 0 else ()
        for axes, size in ((mesh_axes("batch"), batch), (mesh_axes("tokens"), num_image))
    )
    if batch_axes or token_axes:
        image, text = jax.P(batch_axes, token_axes), jax.P(batch_axes)
        function = jax.shard_map(
            function, in_specs=(image, text, text), out_specs=image, check_vma=False
        )
    out = function(image_BxNxHxD, text_key_BxLxHxD, text_value_BxLxHxD)
    return constrain(out.reshape(batch, num_image, -1), "batch", "tokens", None)


def _tokens_to_heads(qkv: Qkv) -> Qkv:
    """Sharded over tokens in, over heads out; whole tokens are what a kernel needs.

    Both ends of each exchange are pinned, or XLA gathers tokens instead.
    """
    heads = qkv.query.shape[2]
    if heads % mesh_axis_size("context"):
        raise ValueError(
            f"num_attention_heads={heads}: must be a multiple of the mesh's context axis,"
            f" {mesh_axis_size('context')}"
        )
    qkv = jax.tree.map(lambda x: constrain(x, "batch", "tokens", None, None), qkv)
    return jax.tree.map(lambda x: constrain(x, "batch", None, "heads", None), qkv)


def _heads_to_tokens(out_BxNxHxD: jax.Array) -> jax.Array:
    """The way back, heads joined: [B, N, H*D]."""
    out = constrain(out_BxNxHxD, "batch", None, "heads", None)
    out = constrain(out, "batch", "tokens", None, None)
    return out.reshape(*out.shape[:2], -1)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask_BxS: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention; query already scaled; [B, S, H, D] in and out; float32 softmax.

    Masked queries return finite numbers of no meaning. `implementation` is one of IMPLEMENTATIONS;
    "auto" goes by the platform of the current mesh's devices, or the default backend without one.
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    if key_mask_BxS is not None:
        chex.assert_shape(key_mask_BxS, (key.shape[0], key.shape[1]))
    implementation = resolve(implementation, query.shape[-1], query.dtype)
    function = {"splash": splash_attention, "cudnn": cudnn_attention, "xla": xla_attention}
    return function[implementation](query, key, value, key_mask_BxS)


def resolve(implementation: str, head_size: int, dtype: jnp.dtype) -> str:
    """Turns "auto" into the implementation for the platform at hand."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r}: use one of {IMPLEMENTATIONS}")
    if implementation != "auto":
        return implementation
    platform = current_platform()
    if platform == "tpu" and head_size % LANES == 0:
        return "splash"
    if platform in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla"


def check(implementation: str, platform: str, head_size: int, dtype: jnp.dtype) -> None:
    """Refuses an implementation that these devices do not have, before anything is compiled.

    Raises:
      ValueError: naming the implementation and what it needs.
    """
    if implementation == "splash" and head_size % LANES:
        raise ValueError(
            f"attention: got splash with heads of {head_size}; allowed: heads of a multiple of "
            f"{LANES}, or auto"
        )
    fused = platform in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16)
    if implementation == "cudnn" and not fused:
        raise ValueError(
            f"attention: got cudnn with {dtype.name} on {platform}; allowed: bfloat16 on an NVIDIA "
            "GPU, or auto"
        )


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_mask_BxS: jax.Array | None
) -> jax.Array:
    """Attention as two einsums with the whole logits matrix in memory."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if key_mask_BxS is not None:
        logits = jnp.where(key_mask_BxS[:, None, None, :], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_mask_BxS: jax.Array | None
) -> jax.Array:
    """cuDNN's fused kernel. It knows lengths, not masks: valid keys are moved to the front."""
    lengths = None
    if key_mask_BxS is not None:
        key, value, lengths = valid_keys_first(key, value, key_mask_BxS)
    return jax.nn.dot_product_attention(
        query, key, value, scale=1.0, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def valid_keys_first(
    key: jax.Array, value: jax.Array, key_mask_BxS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values with the valid ones in front, and how many there are, int32 [B].

    At least 1: an all-masked row must not be NaN.
    """
    order = jnp.argsort(~key_mask_BxS, axis=1, stable=True)[:, :, None, None]
    key, value = (jnp.take_along_axis(x, order, axis=1) for x in (key, value))
    return key, value, jnp.maximum(jnp.sum(key_mask_BxS, axis=1, dtype=jnp.int32), 1)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask_BxS: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The splash kernel per device: batch over (data, fsdp), heads over context, whole sequences.

    Sequences are padded to a multiple of the block size, keys under the mask. `interpret` runs
    the kernel in Python, on any platform.
    """
    (batch, queries, _, head_size), keys = query.shape, key.shape[1]
    if head_size % LANES and not interpret:
        raise ValueError(f"attention_head_dim={head_size}: splash needs a multiple of {LANES}")
    batch_axes, head_axes = mesh_axes("batch"), mesh_axes("heads")
    if batch % mesh_axis_size(*batch_axes):
        raise ValueError(f"batch={batch}: must be a multiple of the mesh axes {batch_axes}")
    query_block, key_block = (min(MAX_BLOCK, -(-n // LANES) * LANES) for n in (queries, keys))
    if key_mask_BxS is None:
        key_mask_BxS = jnp.ones((batch, keys), bool)
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)
        for x, block in ((query, query_block), (key, key_block), (value, key_block))
    )
    segments = jnp.pad(key_mask_BxS, ((0, 0), (0, -keys % key_block))).astype(jnp.int32)

    kernel = functools.partial(
        _splash_local, query_block=query_block, key_block=key_block, interpret=interpret
    )
    if batch_axes or head_axes:
        spec = jax.P(batch_axes, head_axes)
        kernel = jax.shard_map(
            kernel, in_specs=(spec, spec, spec, jax.P(batch_axes)), out_specs=spec, check_vma=False
        )
    return kernel(query, key, value, segments).swapaxes(1, 2)[:, :queries]


def _splash_local(
    query_BxHxQxD: jax.Array,
    key_BxHxSxD: jax.Array,
    value_BxHxSxD: jax.Array,
    segments_BxS: jax.Array,
    *,
    query_block: int,
    key_block: int,
    interpret: bool,
) -> jax.Array:
    (heads, queries), keys = query_BxHxQxD.shape[1:3], key_BxHxSxD.shape[2]
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.FullMask((queries, keys))] * heads
    )
    kernel = splash_attention_kernel.make_splash_mha(
        mask=mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_kv_compute=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_kv_dkv_compute=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        interpret=interpret,
    )

    def one_sample(
        query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
    ) -> jax.Array:
        # Every query is in segment 1, so only keys are masked.
        ids = splash_attention_kernel.SegmentIds(q=jnp.ones(queries, jnp.int32), kv=segments)
        return kernel(query, key, value, segment_ids=ids)

    function = jax.vmap(one_sample)
    if query_BxHxQxD.dtype != jnp.float32:
        function = _at_default_precision(function)
    return function(query_BxHxQxD, key_BxHxSxD, value_BxHxSxD, segments_BxS)


def _at_default_precision(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function(query, key, value, segments)` without the precision that the recipe names.

    Products of bfloat16 numbers are exact at any precision, but Mosaic refuses them ("Bad lhs
    type") where one is named: that of a recipe is meant for float32 products. The kernel has a
    derivative of its own, whose two halves are traced when the gradient is taken; so the precision
    is set within both, and not around the call alone.
    """
    default = functools.partial(jax.default_matmul_precision, "default")

    @jax.custom_vjp
    def plain(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        with default():
            return function(query, key, value, segments)

    def forward(
        query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, Callable]:
        with default():
            return jax.vjp(lambda *qkv: function(*qkv, segments), query, key, value)

    def backward(pull_back: Callable, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
        with default():
            return (*pull_back(gradient), None)

    plain.defvjp(forward, backward)
    return plain
