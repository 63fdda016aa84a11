"""Group-relative advantages: rewards standardized within the rollouts of one prompt."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def group_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    epsilon: float,
    clip: float | None,
    *,
    std_floor: float = 0.0,
) -> jax.Array:
    """Returns A = clip((r - mean) / (std + epsilon)), mean and biased std over the valid members.

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

    Returns:
        f32[P, G]. Source: GRPO, with the mask in place of zero rewards for failures.
    """
    chex.assert_rank(rewards, 2)
    chex.assert_equal_shape([rewards, valid])
    _check_non_negative(epsilon=epsilon, std_floor=std_floor)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip!r}: must be > 0 or None")
    rewards = jnp.asarray(rewards, jnp.float32)
    valid = jnp.asarray(valid, bool) & jnp.isfinite(rewards)
    count_Px1 = valid.sum(axis=1, keepdims=True)
    # Shifted by a member of the group before averaging: equal rewards give exactly 0, and a large
    # common offset costs no digits.
    shift_Px1 = jnp.where(valid, rewards, -jnp.inf).max(axis=1, keepdims=True)
    shift_Px1 = jnp.where(count_Px1 > 0, shift_Px1, 0.0)
    deviation = jnp.where(valid, jnp.where(valid, rewards, 0.0) - shift_Px1, 0.0)
    safe_count_Px1 = jnp.maximum(count_Px1, 1)
    mean_Px1 = deviation.sum(axis=1, keepdims=True) / safe_count_Px1
    deviation = jnp.where(valid, deviation - mean_Px1, 0.0)
    variance_Px1 = (deviation**2).sum(axis=1, keepdims=True) / safe_count_Px1
    usable = (count_Px1 >= 2) & (variance_Px1 > 0)
    std_Px1 = jnp.sqrt(jnp.where(usable, variance_Px1, 1.0))
    advantages = deviation / (jnp.maximum(std_Px1, std_floor) + epsilon)
    if clip is not None:
        advantages = jnp.clip(advantages, -clip, clip)
    return jnp.where(usable & valid, advantages, 0.0)


def _check_non_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: must be >= 0")
