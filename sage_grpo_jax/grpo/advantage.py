"""Group-relative advantages: rewards standardized within the rollouts of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

# What the deviations from the mean of a group are divided by.
STDS = ("group", "group_unbiased", "global")
# How the advantages of several rewards become one.
COMBINES = ("sum", "per_reward")


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
    _check_clip(clip)

    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.asarray(valid, bool) & jnp.isfinite(rewards)
    deviation, count_Px1 = _deviation(rewards, valid, axis=1)

    # The variance, of the group or of all samples
    degrees = count_Px1 - 1 if std == "group_unbiased" else count_Px1
    if std == "global":
        deviation_of_all, degrees = _deviation(rewards, valid, axis=None)
        squares = (deviation_of_all**2).sum(keepdims=True)
    else:
        squares = (deviation**2).sum(axis=1, keepdims=True)
    variance = squares / jnp.maximum(degrees, 1)

    # What cannot be standardized gets 0; it is divided by 1, since epsilon may be 0 and 0/0 is NaN.
    usable = (count_Px1 >= 2) & (variance > 0)
    scale = jnp.maximum(jnp.sqrt(jnp.where(usable, variance, 1.0)), std_floor)
    advantages = deviation / (scale + epsilon)
    if clip is not None:
        advantages = jnp.clip(advantages, -clip, clip)
    return jnp.where(usable & valid, advantages, 0.0)


def combined_advantages(
    rewards: Mapping[str, jax.Array],
    weights: Mapping[str, float],
    valid: jax.Array,
    epsilon: float,
    clip: float | None,
    *,
    std_floor: float = 0.0,
    std: str = "group",
    combine: str = "sum",
) -> jax.Array:
    """Returns the advantages of several rewards; f32[P, G].

    - `sum`: `group_advantages` of Σ w·r. The reward with the largest spread has the largest say.
    - `per_reward`: clip(Σ w·A_r), A_r the advantages of one reward by itself, not clipped: each has
      a spread of 1 in its group, so the weights alone say how much it counts. `epsilon`,
      `std_floor` and `std` hold for each reward in its own units. Where a sample lacks one reward,
      that reward adds nothing and the sample has no part in its statistics; the others count.

    Rewards without a weight, or with weight 0, are not looked at, whatever they hold.

    Args:
      rewards: by name, each [P, G].
      weights: by name; of rewards that are there.
      valid: bool[P, G]; the others get 0.
      epsilon, clip, std_floor, std: see `group_advantages`.
      combine: one of `COMBINES`.

    Raises:
      ValueError: no weight but 0, or a value that is not allowed.

    Source of `per_reward`: GDPO (arXiv 2601.05242), without its last division by the deviation over
    the batch; DanceGRPO has advantages of each reward by itself too, and adds the losses.
    """
    if combine not in COMBINES:
        raise ValueError(f"combine={combine!r}: must be one of {', '.join(COMBINES)}")
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    if not counted:
        raise ValueError(f"weights={dict(weights)!r}: one must not be 0")

    if combine == "sum":
        # A failed reward is NaN in its sample, and so is the sum: the sample counts as failed.
        total = sum(weight * rewards[name] for name, weight in counted.items())
        return group_advantages(total, valid, epsilon, clip, std_floor=std_floor, std=std)

    # Each reward is standardized by itself, and only the sum is clipped.
    advantages = sum(
        weight * group_advantages(rewards[name], valid, epsilon, None, std_floor=std_floor, std=std)
        for name, weight in counted.items()
    )
    _check_clip(clip)
    return advantages if clip is None else jnp.clip(advantages, -clip, clip)


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


def _check_clip(clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip!r}: must be > 0 or None")


def _check_non_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: must be >= 0")
