"""Temporal gradient equalizer: weights that give every denoising step the same gradient scale.

The gradient of a step's log-probability with respect to the predicted velocity has the scale N_t
(`flow.sde.gradient_scale`), which spans two orders of magnitude over a schedule. The weights are
S_t = median(N) / N_t (SAGE-GRPO, temporal gradient equalizer).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.flow import sde
from sage_grpo_jax.flow.schedules import Schedule

MEDIANS = ("lower", "mean")


def gradient_scale(
    kind: str,
    schedule: Schedule,
    eta: float,
    *,
    log_prob: str = "gaussian",
    clamp: float = 0.0,
) -> np.ndarray:
    """Returns N_t, float64[T], 0 for steps without noise. On the host; the schedule is concrete."""
    sigmas = np.asarray(schedule.sigmas, np.float64)
    return sde.gradient_scale(
        kind, sigmas[:-1], sigmas[1:], float(eta), log_prob=log_prob, clamp=clamp, xp=np
    )


def equalizer_weights(
    kind: str,
    schedule: Schedule,
    eta: float,
    trained: np.ndarray,
    *,
    median: str = "lower",
    log_prob: str = "gaussian",
    clamp: float = 0.0,
) -> jax.Array:
    """Returns S_t = median(N) / N_t, f32[T]; 0 for steps that are not trained or have no noise.

    Args:
      kind, eta: transition of the stochastic steps, see `flow.sde.transition`.
      schedule: T steps, concrete.
      trained: bool[T], concrete; the median is taken over these steps.
      median: of an even count, the `lower` middle value (as torch.median, and so the official
        code) or the `mean` of the two.
      log_prob: form of the log-probability, one of `flow.sde.LOG_PROBS`.
      clamp: of the transition, see `flow.sde.step_coefficients`.
    """
    if median not in MEDIANS:
        raise ValueError(f"median={median!r}: must be one of {', '.join(MEDIANS)}")

    scale = gradient_scale(kind, schedule, eta, log_prob=log_prob, clamp=clamp)
    # Steps without noise have no log-probability: they get no weight and no say in the median.
    trained = _as_mask(trained, scale) & (scale > 0)

    weights = np.zeros_like(scale)
    if trained.any():
        ordered = np.sort(scale[trained])
        lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
        middle = lower if median == "lower" else 0.5 * (lower + upper)
        weights[trained] = middle / scale[trained]
    return _on_device(weights)


def _as_mask(trained: np.ndarray, scale: np.ndarray) -> np.ndarray:
    trained = np.asarray(trained, bool)
    if trained.shape != scale.shape:
        raise ValueError(f"trained: must have shape {scale.shape}, has {trained.shape}")
    return trained


def _on_device(weights: np.ndarray) -> jax.Array:
    # The weights are concrete also where a trace is under way.
    with jax.ensure_compile_time_eval():
        return jnp.asarray(weights, jnp.float32)
