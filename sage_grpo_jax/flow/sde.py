"""One denoising step as a Gaussian: x' ~ N(mean, std²·I), for five ways of injecting noise.

Rectified flow: x_σ = (1 - σ)·x0 + σ·z, velocity v = z - x0, predicted noise x̂1 = x + (1 - σ)·v,
score s = -x̂1/σ. Every kind here has the form

    mean = x + (σ' - σ)·v - removed·x̂1,      std,

the step of the probability-flow ODE, less the part of the predicted noise that is taken out to
make room for the fresh noise. `precise`, `flow` and `dance` are Euler-Maruyama steps, mean =
x + dt·v + ½·std²·s, so removed = std²/(2σ); they differ in std. `cps` rotates the predicted noise
into the fresh noise: removed = σ'·(1 - cos(η·π/2)), std = σ'·sin(η·π/2).

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

from sage_grpo_jax.flow.schedules import Schedule

KINDS = ("precise", "flow", "dance", "cps", "ode")
LOG_PROBS = ("gaussian", "squared")
LAST_STEPS = ("deterministic", "stochastic")
REDUCTIONS = ("mean", "sum")

# `precise` never looks closer than this to σ = 1, where its variance integral diverges, unless
# another clamp is asked for.
CLAMP = 3e-3
HIGHEST_CLAMP = 0.5
CLAMPED = ("precise", "flow")  # the kinds whose variance diverges there

# A smaller std counts as 0: it is lost in the rounding of any sample it is added to, and dividing
# by it overflows.
_SMALLEST_STD = 1e-12

# Below this z, z - log1p(z) comes from its series (the subtraction would cancel).
_SERIES_BELOW = 0.1
_SERIES_TERMS = 10


class Transition(NamedTuple):
    """A Gaussian step. std is 0 where the step is deterministic."""

    mean: jax.Array  # [B, ...], the shape of the sample
    std: jax.Array  # () for scalar σ and η, [B, 1, ..., 1] where one of them is [B]


class StepCoefficients(NamedTuple):
    """What a kind does at one step: mean = x + (σ' - σ)·v - removed·x̂1, and std."""

    removed: Any
    std: Any


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
        kind: one of KINDS.
        sigma: σ at the start of the step, in (0, 1].
        sigma_next: σ' at its end, in [0, σ).
        eta: noise level, ≥ 0 (`cps`: ≤ 1). Its meaning differs between kinds.
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
    if kind == "ode":
        zero = xp.zeros_like(sigma + sigma_next)
        return StepCoefficients(removed=zero, std=zero)
    if kind == "cps":
        # 1 - cos(θ) = 2·sin²(θ/2) keeps small η exact, and η = 0 exactly the ODE step.
        removed = 2.0 * sigma_next * xp.sin(0.25 * math.pi * eta) ** 2
        std = sigma_next * xp.sin(0.5 * math.pi * eta)
    else:
        variance = xp.maximum(_VARIANCES[kind](sigma, sigma_next, clamp, xp), 0.0)
        removed = 0.5 * eta**2 * variance / xp.where(sigma > 0, sigma, 1.0)
        std = eta * _safe_sqrt(variance, xp)
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
        kind: one of KINDS.
        velocity: v = z - x0 predicted at `sample`, [B, ...].
        sample: x at σ, [B, ...].
        sigma, sigma_next, eta: scalars or [B], traced or not; 0 ≤ σ' < σ ≤ 1.
        clamp: see `step_coefficients`.

    Computed in float32 (float64 for float64 inputs). Sources, in the order of KINDS: SAGE-GRPO's
    integrated variance, with both ends clamped; Flow-GRPO; DanceGRPO; Flow-CPS; the Euler step.

    Raises:
        ValueError: unknown kind, or eta or clamp is a plain number out of range.
    """
    chex.assert_equal_shape([velocity, sample])
    dtype = _float_dtype(velocity, sample)
    velocity, sample = jnp.asarray(velocity, dtype), jnp.asarray(sample, dtype)
    check_kind_and_eta(kind, eta)
    sigma, sigma_next, eta = (
        _per_sample(jnp.asarray(value, dtype), sample.ndim) for value in (sigma, sigma_next, eta)
    )
    removed, std = step_coefficients(kind, sigma, sigma_next, eta, clamp=clamp)
    predicted_noise = sample + (1.0 - sigma) * velocity
    mean = sample + (sigma_next - sigma) * velocity - removed * predicted_noise
    return Transition(mean=mean, std=std)


def velocity_sensitivity(
    kind: str, sigma: Any, sigma_next: Any, eta: Any, *, clamp: float = 0.0
) -> jax.Array:
    """Returns λ_t = |∂mean/∂v| of steps σ → σ', element by element; shapes broadcast."""
    check_kind_and_eta(kind, eta)
    dtype = _float_dtype(sigma, sigma_next)
    sigma, sigma_next, eta = (jnp.asarray(value, dtype) for value in (sigma, sigma_next, eta))
    removed, _ = step_coefficients(kind, sigma, sigma_next, eta, clamp=clamp)
    return (sigma - sigma_next) + removed * (1.0 - sigma)


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


def require_stochastic(stochastic: np.ndarray, kind: str, eta: float) -> None:
    """Raises ValueError when no step of a training recipe injects noise: nothing can be trained."""
    if not np.any(stochastic):
        raise ValueError(
            f"kind={kind!r}, eta={eta}, {len(stochastic)} steps: no step injects noise, so there "
            "is nothing to train; use a kind other than 'ode', eta > 0, more steps, or "
            "last_step='stochastic'"
        )


def check_kind_and_eta(kind: str, eta: Any) -> None:
    """Raises ValueError for an unknown kind, or for a plain number eta out of range."""
    check_choice("kind", kind, KINDS)
    if not isinstance(eta, (numbers.Real, np.ndarray)):
        return
    highest = 1.0 if kind == "cps" else math.inf
    if not np.all(np.isfinite(eta) & (np.asarray(eta) >= 0.0) & (np.asarray(eta) <= highest)):
        allowed = "0 <= eta <= 1" if kind == "cps" else "a finite number >= 0"
        raise ValueError(f"eta={eta!r} for kind={kind!r}: must be {allowed}")


def check_clamp(clamp: float) -> None:
    """Raises ValueError unless 0 ≤ clamp ≤ HIGHEST_CLAMP."""
    if not 0.0 <= clamp <= HIGHEST_CLAMP:
        raise ValueError(f"clamp={clamp!r}: must be 0 to {HIGHEST_CLAMP}")


def _precise_variance(sigma: Any, sigma_next: Any, clamp: float, xp: ModuleType) -> Any:
    """Returns log(b/a) - (b - a), a = max(1 - σ, c), b = max(1 - σ', c), c the clamp.

    Written with z = (b - a)/a as z·(1 - a) - (z - log1p(z)): the direct form cancels to nothing
    for short steps (negative in float32 at T = 1000), here every term is accurate.
    """
    # Rounded to float32 so that host and device agree on which steps lie inside the clamp. The σ
    # at the clamp is rounded too, and 1 - σ' may then lie a little above the clamp. A step that
    # ends there lies inside it: with c = 3e-3 it had a std of 2.6e-3·η that is rounding alone.
    clamped_sigma = float(np.float32(1.0 - (clamp or CLAMP)))
    clamp = float(np.float32(clamp or CLAMP))
    unclamped = 1.0 - sigma >= clamp
    a = xp.maximum(1.0 - sigma, clamp)
    # σ - σ' and σ are exact where (1 - σ') - (1 - σ) and 1 - a would be rounded twice. The other
    # branch must not read 1 - σ' - c: XLA folds that into (1 - c) - σ', 4 % off in std.
    step = xp.where(unclamped, sigma - sigma_next, xp.maximum(1.0 - sigma_next, clamp) - clamp)
    one_minus_a = xp.where(unclamped, sigma, 1.0 - clamp)
    z = step / a
    variance = z * one_minus_a - _z_minus_log1p(z, xp)
    return xp.where(sigma_next < clamped_sigma, variance, 0.0)


def _flow_variance(sigma: Any, sigma_next: Any, clamp: float, xp: ModuleType) -> Any:
    """Returns σ·(σ - σ')/(1 - σ*), σ* = σ, and σ' where σ = 1; or 1 - σ* = max(1 - σ, clamp)."""
    if clamp:
        distance = xp.maximum(1.0 - sigma, clamp)
    else:
        distance = xp.where(sigma >= 1.0, 1.0 - sigma_next, 1.0 - sigma)
    return sigma * (sigma - sigma_next) / xp.where(distance > 0, distance, 1.0)


def _dance_variance(sigma: Any, sigma_next: Any, clamp: float, xp: ModuleType) -> Any:
    del clamp, xp
    return sigma - sigma_next


# Variance of a step at η = 1; it grows with η².
_VARIANCES = {"precise": _precise_variance, "flow": _flow_variance, "dance": _dance_variance}


def _z_minus_log1p(z: Any, xp: ModuleType) -> Any:
    """Returns z - log1p(z) for z ≥ 0 without cancellation: z²·(1/2 - z/3 + z²/4 - …) if small."""
    small = xp.where(z < _SERIES_BELOW, z, 0.0)
    series = xp.zeros_like(small)
    for k in reversed(range(2, _SERIES_TERMS + 2)):
        series = 1.0 / k - small * series
    return xp.where(z < _SERIES_BELOW, small**2 * series, z - xp.log1p(z))


def _safe_sqrt(value: Any, xp: ModuleType) -> Any:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    return xp.where(value > 0, xp.sqrt(xp.where(value > 0, value, 1.0)), 0.0)


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
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
