"""Group-relative advantages: rewards standardized within the rollouts of one prompt."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

# What the deviations from the mean of a group are divided by.
STDS = ("group", "group_unbiased", "global")


def group_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    epsilon: float,
    clip: float | None,
    *,
    std_floor: float = 0.0,
    std: str = "group",
) -> jax.Array:
    """Returns A = clip((r - mean) / (std + epsilon)), mean over the valid members of the group.

    A failed sample is left out, never scored: it has advantage 0 and no weight in the statistics
    of its group, whatever its reward entry holds. Non-finite rewards count as failed. Groups with
    fewer than two valid members, or with equal rewards, get zeros.

    Args:
        rewards: [P, G], P prompts with G rollouts each.
        valid: bool[P, G].
        epsilon: ≥ 0, in reward units.
        clip: advantages are clipped to ±clip; None: not clipped.
        std_floor: lower bound of std in reward units; keeps groups with nearly equal rewards
            from being blown up to full size.
        std: `group`, of the valid members of the group; `group_unbiased`, the same over one less
            than their number (DanceGRPO); `global`, of all valid samples around the mean of all
            (Flow-GRPO's global_std): groups with nearly equal rewards count less.

    Returns:
        f32[P, G]. Source: GRPO, with the mask in place of zero rewards for failures.
    """
    chex.assert_rank(rewards, 2)
    chex.assert_equal_shape([rewards, valid])
    _check_non_negative(epsilon=epsilon, std_floor=std_floor)
    if std not in STDS:
        raise ValueError(f"std={std!r}: must be one of {', '.join(STDS)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip!r}: must be > 0 or None")
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.asarray(valid, bool) & jnp.isfinite(rewards)
    deviation, count_Px1 = _deviation(rewards, valid, axis=1)
    degrees = count_Px1 - 1 if std == "group_unbiased" else count_Px1
    if std == "global":
        deviation_of_all, degrees = _deviation(rewards, valid, axis=None)
        squares = (deviation_of_all**2).sum(keepdims=True)
    else:
        squares = (deviation**2).sum(axis=1, keepdims=True)
    variance = squares / jnp.maximum(degrees, 1)
    usable = (count_Px1 >= 2) & (variance > 0)
    scale = jnp.maximum(jnp.sqrt(jnp.where(usable, variance, 1.0)), std_floor)
    advantages = deviation / (scale + epsilon)
    if clip is not None:
        advantages = jnp.clip(advantages, -clip, clip)
    return jnp.where(usable & valid, advantages, 0.0)


def group_std(rewards: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the mean over the groups of the biased std within each, f32[]; see Fig. 8b.

    Groups with fewer than two valid members say nothing; NaN where there is no other. Arguments as
    for `group_advantages`.
    """
    chex.assert_rank(rewards, 2)
    chex.assert_equal_shape([rewards, valid])
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.asarray(valid, bool) & jnp.isfinite(rewards)
    deviation, count_Px1 = _deviation(rewards, valid, axis=1)
    stds = jnp.sqrt((deviation**2).sum(axis=1) / jnp.maximum(count_Px1[:, 0], 1))
    return jnp.mean(stds, where=count_Px1[:, 0] >= 2)


def _deviation(rewards: jax.Array, valid: jax.Array, axis: int | None) -> tuple[Any, Any]:
    """(deviation from the mean of the valid entries, 0 elsewhere; their number) along an axis."""
    count = valid.sum(axis=axis, keepdims=True)
    # Shifted by one of the entries before averaging: equal rewards give exactly 0, and a large
    # common offset costs no digits.
    shift = jnp.where(valid, rewards, -jnp.inf).max(axis=axis, keepdims=True)
    shift = jnp.where(count > 0, shift, 0.0)
    deviation = jnp.where(valid, jnp.where(valid, rewards, 0.0) - shift, 0.0)
    mean = deviation.sum(axis=axis, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(valid, deviation - mean, 0.0), count


def _check_non_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: must be >= 0")
