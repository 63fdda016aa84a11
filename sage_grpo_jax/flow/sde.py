"""One denoising step as a Gaussian: x' ~ N(mean, std²·I), whatever the kind of noise.

Transition, sensitivity, log-probabilities and ratios follow from an entry of `kinds.KINDS` alone.
std = 0 means deterministic: no log-probability, nothing to train. Log-probabilities, log-ratios
and their gradients are then exactly 0.
"""

from __future__ import annotations

import math
import numbers
from types import ModuleType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.flow.kinds import KINDS, StepCoefficients
from sage_grpo_jax.flow.schedules import Schedule

LOG_PROBS = ("gaussian", "squared")
LAST_STEPS = ("deterministic", "stochastic")
REDUCTIONS = ("mean", "sum")

HIGHEST_CLAMP = 0.5
# The largest η that a recipe or a flag may ask for; a kind may allow less.
HIGHEST_ETA = 2.0

# A smaller std counts as 0: it is lost in the rounding of any sample it is added to, and dividing
# by it overflows.
_SMALLEST_STD = 1e-12


class Transition(NamedTuple):
    """A Gaussian step. std is 0 where the step is deterministic."""

    mean: jax.Array  # [B, ...], the shape of the sample
    std: jax.Array  # () for scalar σ and η, [B, 1, ..., 1] where one of them is [B]


def step_coefficients(
    kind: str,
    sigma: Any,
    sigma_next: Any,
    eta: Any,
    *,
    clamp: float = 0.0,
    xp: ModuleType = jnp,
) -> StepCoefficients:
    """Returns the coefficients of steps σ → σ', element by element, any shape.

    With `xp=numpy` and float64 inputs the same formulas run on the host in float64.

    Args:
      kind: a name in KINDS.
      sigma: σ at the start of the step, in (0, 1].
      sigma_next: σ' at its end, in [0, σ).
      eta: noise level, 0 to the `highest_eta` of the kind. Its meaning differs between kinds.
      clamp: how close to σ = 1 a step may look, 1 - σ ≥ clamp, where the variance of `precise`
        and `flow` diverges; at most HIGHEST_CLAMP. 0: as their authors have it, that is CLAMP
        for `precise`, while `flow` takes σ' for σ = 1. The other kinds have no such place and
        do not read it.
      xp: array module, jax.numpy or numpy.

    Raises:
      ValueError: unknown kind, clamp out of range, or eta is a plain number out of range
        (traced: not checked).
    """
    check_kind_and_eta(kind, eta)
    check_clamp(clamp)
    removed, std = KINDS[kind].coefficients(sigma, sigma_next, eta, clamp, xp)
    return StepCoefficients(removed, std=xp.where(std > _SMALLEST_STD, std, 0.0))


def transition(
    kind: str,
    velocity: jax.Array,
    sample: jax.Array,
    sigma: Any,
    sigma_next: Any,
    eta: Any,
    *,
    clamp: float = 0.0,
) -> Transition:
    """Returns mean and std of the step σ → σ' from `sample`.

    Args:
      kind: a name in KINDS.
      velocity: v = z - x0 predicted at `sample`, [B, ...].
      sample: x at σ, [B, ...].
      sigma, sigma_next, eta: scalars or [B], traced or not; 0 ≤ σ' < σ ≤ 1.
      clamp: see `step_coefficients`.

    Computed in float32 (float64 for float64 inputs).

    Raises:
      ValueError: unknown kind, or eta or clamp is a plain number out of range.
    """
    chex.assert_equal_shape([velocity, sample])
    dtype = _float_dtype(velocity, sample)
    velocity, sample = jnp.asarray(velocity, dtype), jnp.asarray(sample, dtype)
    check_kind_and_eta(kind, eta)  # before eta becomes an array, whose value is not looked at
    sigma, sigma_next, eta = (
        _per_sample(jnp.asarray(value, dtype), sample.ndim) for value in (sigma, sigma_next, eta)
    )

    removed, std = step_coefficients(kind, sigma, sigma_next, eta, clamp=clamp)
    # x̂1 = x + (1 - σ)·v, and with it mean = x + dt·v - removed·x̂1 for every kind
    predicted_noise = sample + (1.0 - sigma) * velocity
    mean = sample + (sigma_next - sigma) * velocity - removed * predicted_noise
    return Transition(mean=mean, std=std)


def velocity_sensitivity(
    kind: str,
    sigma: Any,
    sigma_next: Any,
    eta: Any,
    *,
    clamp: float = 0.0,
    xp: ModuleType = jnp,
) -> Any:
    """Returns λ_t = |∂mean/∂v| of steps σ → σ', element by element; shapes broadcast.

    Arguments as for `step_coefficients`.
    """
    check_kind_and_eta(kind, eta)
    if xp is jnp:
        dtype = _float_dtype(sigma, sigma_next)
        sigma, sigma_next, eta = (jnp.asarray(value, dtype) for value in (sigma, sigma_next, eta))
    removed, _ = step_coefficients(kind, sigma, sigma_next, eta, clamp=clamp, xp=xp)
    # -∂mean/∂v = (σ - σ') + removed·(1 - σ), both at least 0.
    return (sigma - sigma_next) + removed * (1.0 - sigma)


def gradient_scale(
    kind: str,
    sigma: Any,
    sigma_next: Any,
    eta: Any,
    *,
    log_prob: str = "gaussian",
    clamp: float = 0.0,
    xp: ModuleType = jnp,
) -> Any:
    """Returns N_t, the scale of ∂log_prob/∂v, of steps σ → σ'; 0 where they inject no noise.

    The Gaussian log-probability has N_t = λ_t / std_t. The squared one, -(x' - mean)², has the
    gradient 2·std_t·ε·λ_t, so N_t = std_t·λ_t (constant factors drop out of all its uses).

    Args:
      kind, sigma, sigma_next, eta, clamp, xp: see `step_coefficients`.
      log_prob: one of LOG_PROBS.
    """
    check_choice("log_prob", log_prob, LOG_PROBS)
    _, std = step_coefficients(kind, sigma, sigma_next, eta, clamp=clamp, xp=xp)
    sensitivity = velocity_sensitivity(kind, sigma, sigma_next, eta, clamp=clamp, xp=xp)
    if log_prob == "squared":
        return sensitivity * std
    return xp.where(std > 0, sensitivity / xp.where(std > 0, std, 1.0), 0.0)


def log_prob(
    next_sample: jax.Array,
    mean: jax.Array,
    std: Any,
    *,
    log_prob: str = "gaussian",
    reduction: str = "mean",
) -> jax.Array:
    """Returns the log-probability [B] of `next_sample` under N(mean, std²·I); 0 where std = 0.

    `gaussian` is the density with its constants; `squared` is -(x' - mean)², the form of
    Flow-CPS. The elements [B, ...] of a sample are averaged (or summed), as all GRPO code does.
    """
    chex.assert_equal_shape([next_sample, mean])
    check_choice("log_prob", log_prob, LOG_PROBS)
    dtype = _float_dtype(next_sample, mean)
    std = _per_sample(jnp.asarray(std, dtype), mean.ndim)
    noisy, safe_std = std > 0, jnp.where(std > 0, std, 1.0)
    difference = jnp.asarray(next_sample, dtype) - jnp.asarray(mean, dtype)
    if log_prob == "squared":
        density = -(difference**2)
    else:
        density = -0.5 * (difference / safe_std) ** 2 - jnp.log(safe_std)
        density -= 0.5 * math.log(2.0 * math.pi)
    return reduce_elements(jnp.where(noisy, density, 0.0), reduction)


def log_ratio(
    noise: jax.Array,
    mean_new: jax.Array,
    mean_old: jax.Array,
    std: Any,
    *,
    log_prob: str = "gaussian",
    reduction: str = "mean",
) -> jax.Array:
    """Returns log π_new(x')/π_old(x') [B] for x' = mean_old + std·noise; 0 where std = 0.

    Computed as mean(ε·δ - δ²/2), δ = (mean_new - mean_old)/std. The difference of two
    log-probabilities is the same number, but loses all its digits in float32.

    Args:
      noise: the ε that was drawn in the rollout, [B, ...].
      mean_new, mean_old: [B, ...]; gradients flow into both.
      std: scalar, [B] or [B, 1, ..., 1], the same for both policies.
      log_prob: `gaussian`, or `squared` for -(x' - mean)²: 2·std² times the above.
      reduction: over the elements of a sample, `mean` or `sum`.
    """
    chex.assert_equal_shape([noise, mean_new, mean_old])
    check_choice("log_prob", log_prob, LOG_PROBS)
    dtype = _float_dtype(mean_new, mean_old)
    std = _per_sample(jnp.asarray(std, dtype), mean_new.ndim)
    noise = jnp.asarray(noise, dtype)
    delta = standardized_difference(mean_new, mean_old, std)
    # -(ε - δ)²/2 + ε²/2 at x' = mean_old + std·ε. The squares of ε cancel here on paper; in float32
    # they would take the digits of δ with them.
    ratio = noise * delta - 0.5 * delta**2
    if log_prob == "squared":
        ratio = 2.0 * std**2 * ratio
    return reduce_elements(ratio, reduction)


def standardized_difference(mean: jax.Array, mean_ref: jax.Array, std: Any) -> jax.Array:
    """Returns (mean - mean_ref)/std [B, ...], 0 with zero gradients where std = 0."""
    chex.assert_equal_shape([mean, mean_ref])
    dtype = _float_dtype(mean, mean_ref)
    std = _per_sample(jnp.asarray(std, dtype), mean.ndim)
    difference = jnp.asarray(mean, dtype) - jnp.asarray(mean_ref, dtype)
    # Two wheres: the first keeps the division finite, the second its gradient.
    return jnp.where(std > 0, difference / jnp.where(std > 0, std, 1.0), 0.0)


def reduce_elements(values: jax.Array, reduction: str = "mean") -> jax.Array:
    """Reduces [B, ...] to [B] by `mean` or `sum` over all axes but the first."""
    check_choice("reduction", reduction, REDUCTIONS)
    axes = tuple(range(1, values.ndim))
    return values.mean(axes) if reduction == "mean" else values.sum(axes)


def stochastic_steps(
    kind: str,
    schedule: Schedule,
    eta: float,
    last_step: str = "deterministic",
    *,
    clamp: float = 0.0,
) -> np.ndarray:
    """Returns bool[T]: the steps that inject noise, and so can be trained.

    A deterministic last step gives clean samples: whatever it would inject stays in the video.
    The schedule must be concrete; computed on the host.
    """
    check_choice("last_step", last_step, LAST_STEPS)
    sigmas = np.asarray(schedule.sigmas, np.float64)
    _, std = step_coefficients(kind, sigmas[:-1], sigmas[1:], float(eta), clamp=clamp, xp=np)
    noisy = std > 0
    if last_step == "deterministic":
        noisy[-1] = False
    return noisy


def check_kind_and_eta(kind: str, eta: Any) -> None:
    """Raises ValueError for an unknown kind, or for a plain number eta out of range."""
    check_choice("kind", kind, tuple(KINDS))
    if not isinstance(eta, (numbers.Real, np.ndarray)):
        return
    highest = KINDS[kind].highest_eta
    if not np.all(np.isfinite(eta) & (np.asarray(eta) >= 0.0) & (np.asarray(eta) <= highest)):
        allowed = f"0 <= eta <= {highest:g}" if highest < math.inf else "a finite number >= 0"
        raise ValueError(f"eta={eta!r} for kind={kind!r}: must be {allowed}")


def check_clamp(clamp: float) -> None:
    """Raises ValueError unless 0 ≤ clamp ≤ HIGHEST_CLAMP."""
    if not 0.0 <= clamp <= HIGHEST_CLAMP:
        raise ValueError(f"clamp={clamp!r}: must be 0 to {HIGHEST_CLAMP}")


def _per_sample(value: jax.Array, rank: int) -> jax.Array:
    """Makes a scalar, a [B] or an already broadcastable array broadcast against rank axes."""
    if value.ndim == 1 and rank > 1:
        return value.reshape(value.shape + (1,) * (rank - 1))
    if value.ndim not in (0, rank):
        raise ValueError(
            f"shape {value.shape} of sigma, eta or std: must be (), (B,) or of rank {rank}"
        )
    return value


def _float_dtype(*values: Any) -> Any:
    """float32, or float64 where one of the values is float64 and jax_enable_x64 is set."""
    wide = jax.config.jax_enable_x64 and any(
        getattr(value, "dtype", None) == np.float64 for value in values
    )
    return jnp.float64 if wide else jnp.float32


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, naming the argument, unless the value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
