"""Classifier-free guidance: v = v_negative + scale·(v_condition - v_negative)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MODES = ("batch", "sequential")
GRADIENTS = ("both", "condition")

# velocity_fn(latents [B, ...], timestep [B], condition) -> velocity [B, ...]
ConditionalVelocity = Callable[[jax.Array, jax.Array, Any], jax.Array]
# fn(latents [B, ...], timestep [B], condition, negative_condition) -> velocity f32[B, ...]
GuidedVelocity = Callable[..., jax.Array]


def guided(
    velocity_fn: ConditionalVelocity, scale: float, mode: str = "batch", gradient: str = "both"
) -> GuidedVelocity:
    """Returns fn(latents, timestep, condition, negative=None) -> guided velocity, float32.

    Args:
      velocity_fn: velocity_fn(latents, timestep, condition); parameters may be closed over and
        get gradients.
      scale: guidance scale, ≥ 0; 1 runs the condition alone and ignores the negative.
      mode: `batch` runs both branches as one batch of 2·B. `sequential` runs them one after the
        other and keeps nothing of either for the backward pass: half the memory, one more
        forward of each branch under grad.
      gradient: of `both` branches, or of that with the `condition` alone, the other being a
        constant (Flow-GRPO): its backward pass is saved, and each branch runs by itself.

    Condition and negative condition are pytrees of the same structure and shapes, leaves [B, ...].

    Raises:
      ValueError: scale, mode or gradient out of range, or (from fn) condition trees that differ.
    """
    if not (math.isfinite(scale) and scale >= 0.0):
        raise ValueError(f"scale={scale!r}: must be a finite number >= 0")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r}: must be one of {', '.join(GRADIENTS)}")

    branches = _both_in_batch if mode == "batch" else _one_after_the_other
    branches = branches if gradient == "both" else _condition_alone

    def velocity(
        latents: jax.Array, timestep: jax.Array, condition: Any, negative: Any = None
    ) -> jax.Array:
        # The negative branch has the factor 0: it is not run.
        if scale == 1.0:
            return velocity_fn(latents, timestep, condition).astype(jnp.float32)

        _check_same_structure(condition, negative)
        positive_v, negative_v = branches(velocity_fn, latents, timestep, condition, negative)
        # The difference is one of float32: guidance multiplies whatever rounding is in it.
        positive_v, negative_v = (v.astype(jnp.float32) for v in (positive_v, negative_v))
        return negative_v + scale * (positive_v - negative_v)

    return velocity


def _both_in_batch(
    velocity_fn: ConditionalVelocity,
    latents: jax.Array,
    timestep: jax.Array,
    condition: Any,
    negative: Any,
) -> tuple[jax.Array, jax.Array]:
    def interleave(first: jax.Array, second: jax.Array) -> jax.Array:
        # The two branches of a sample lie next to each other: a batch that is sharded over
        # devices stays where it is, where concatenation would move half of it.
        return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    doubled = velocity_fn(
        interleave(latents, latents),
        interleave(timestep, timestep),
        jax.tree.map(interleave, condition, negative),
    )
    # [2·B, ...] -> [B, 2, ...]
    pairs = doubled.reshape(-1, 2, *doubled.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def _one_after_the_other(
    velocity_fn: ConditionalVelocity,
    latents: jax.Array,
    timestep: jax.Array,
    condition: Any,
    negative: Any,
) -> tuple[jax.Array, jax.Array]:
    # A checkpoint around two plain calls would be merged into one by XLA, with both branches
    # alive; a loop runs them apart. Inside a loop nothing can be merged, hence prevent_cse=False.
    branch = jax.checkpoint(
        lambda branch_condition: velocity_fn(latents, timestep, branch_condition),
        prevent_cse=False,
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), condition, negative)
    _, velocities = jax.lax.scan(lambda carry, c: (carry, branch(c)), None, stacked)
    return velocities[0], velocities[1]


def _condition_alone(
    velocity_fn: ConditionalVelocity,
    latents: jax.Array,
    timestep: jax.Array,
    condition: Any,
    negative: Any,
) -> tuple[jax.Array, jax.Array]:
    positive_v = velocity_fn(latents, timestep, condition)
    return positive_v, jax.lax.stop_gradient(velocity_fn(latents, timestep, negative))


def _check_same_structure(condition: Any, negative: Any) -> None:
    structures = jax.tree.structure(condition), jax.tree.structure(negative)
    if structures[0] != structures[1]:
        raise ValueError(
            f"negative condition: must have the structure of the condition, {structures[0]}, "
            f"is {structures[1]}"
        )
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (condition, negative)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"negative condition: must have the shapes of the condition, {shapes[0]}, "
            f"has {shapes[1]}"
        )
