"""The policy loss: clipped importance ratios (PPO) or REINFORCE, weighted per denoising step."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

OBJECTIVES = ("ppo", "reinforce")

# Beyond it exp() is capped and the gradient 0: an infinite ratio times an advantage of 0 is NaN.
_MAX_LOG_RATIO = 20.0

Metrics = dict[str, jax.Array]


def policy_loss(
    log_ratio: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    clip_range: Any,
    *,
    mask: jax.Array | None = None,
    objective: str = "ppo",
    normalizer: Any = None,
) -> tuple[jax.Array, Metrics]:
    """Returns the loss to minimise and its metrics.

    `ppo`: the mean over (sample, step) entries of max(-A·r, -A·clip(r, 1 ± clip_range))·S_t with
    r = exp(log_ratio). `reinforce`: of -A·S_t·log_ratio, whose gradient is that of
    -A·S_t·log π (SAGE-GRPO Eq. 43). At r = 1 both have the same gradient.

    Args:
      log_ratio: log π_new/π_old, [B, T].
      advantages: [B].
      weights: S_t, [T]; or [B, T] for micro-batches whose samples are at different steps.
      clip_range: > 0; not used by `reinforce`.
      mask: bool[B, T], the entries that count; what the others hold does not matter. All count
        by default, also those with weight 0.
      objective: one of OBJECTIVES.
      normalizer: what the sum is divided by; default: the number of masked entries. To
        accumulate over micro-batches give each the count of the whole batch: losses and
        gradients then add up to those of the whole batch, and metrics with
        `accumulate_metrics`. For a sum over steps, scale `weights` by the number of steps.

    Returns:
      loss, f32 scalar, and {ratio/mean, ratio/max_deviation, ratio/clip_fraction}, f32 scalars;
      max_deviation is max |r - 1|, clip_fraction the share with |r - 1| > clip_range.
    """
    chex.assert_rank([log_ratio, advantages], [2, 1])
    _check_arguments(clip_range, objective)

    # Shapes and mask
    shape = log_ratio.shape
    mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
    chex.assert_shape(mask, shape)
    if normalizer is None:
        normalizer = jnp.maximum(mask.sum(), 1)
    # The mask comes before any arithmetic: a NaN behind it must not reach loss or gradients.
    log_ratio = jnp.where(mask, jnp.asarray(log_ratio, jnp.float32), 0.0)
    advantages = jnp.where(mask, jnp.asarray(advantages, jnp.float32)[:, None], 0.0)
    weights = jnp.where(mask, jnp.broadcast_to(jnp.asarray(weights, jnp.float32), shape), 0.0)

    # The loss of every entry. r - 1 instead of r: clip ranges of 1e-4 and less are near the
    # resolution of float32 at 1.
    deviation = jnp.expm1(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    if objective == "ppo":
        clipped = jnp.clip(deviation, -clip_range, clip_range)
        # Where the ratio has left the range in the direction that the advantage asks for, the
        # clipped term is the larger one, and its gradient is 0. -A·r is -A·(r - 1) less A.
        losses = jnp.maximum(-advantages * deviation, -advantages * clipped) - advantages
    else:
        losses = -advantages * log_ratio

    loss = (losses * weights).sum() / normalizer
    return loss, jax.lax.stop_gradient(_ratio_metrics(deviation, mask, clip_range, normalizer))


def accumulate_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Combines the metrics of two micro-batches that were given the same normalizer."""
    return {
        name: jnp.maximum(first[name], second[name])
        if name.endswith("/max_deviation")
        else first[name] + second[name]
        for name in first
    }


def _ratio_metrics(
    deviation: jax.Array, mask: jax.Array, clip_range: Any, normalizer: Any
) -> Metrics:
    # Masked entries have a log-ratio of 0, so they add nothing to the largest deviation.
    outside = mask & (jnp.abs(deviation) > clip_range)
    return {
        "ratio/mean": jnp.where(mask, 1.0 + deviation, 0.0).sum() / normalizer,
        "ratio/max_deviation": jnp.abs(deviation).max(initial=0.0),
        "ratio/clip_fraction": outside.sum() / normalizer,
    }


def _check_arguments(clip_range: Any, objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: must be one of {', '.join(OBJECTIVES)}")
    if isinstance(clip_range, (int, float)) and not clip_range > 0:
        raise ValueError(f"clip_range={clip_range!r}: must be > 0")
