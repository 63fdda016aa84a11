"""The algorithm a second time, from the papers, in float64: what `debug.shadow` compares with.

Differences of log-probabilities, `exp`, variances as printed; steps, weights and λ from the config
and from what the run measured. What `flow/`, `grpo/` and the update rewrite for the sake of float32
or of the device has no place here, and nothing of it is called.
"""

from __future__ import annotations

import collections
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.config import schema
from sage_grpo_jax.grpo.trust_region import TrustRegionConfig

# Of the paper's App. A.2, rounded as σ is.
_CLAMP = float(np.float32(3e-3))
# A clamped variance integral over less than this is rounding of σ.
_NO_LENGTH = 1e-7

# The choices of a config that are written out below. What is not in this list has no second
# formula, and a comparison with that of another choice would be worse than none.
_WRITTEN_OUT = {
    "rollout.sde": ("precise", "flow", "dance", "cps"),
    "rollout.window": ("all", "first_k", "random_k", "progressive", "decay", "dynamic"),
    "rollout.trained_choice": ("first", "random"),
    "rollout.last_step": ("deterministic", "stochastic"),
    "loss.objective": ("ppo", "reinforce"),
    "loss.median": ("lower", "mean"),
    "loss.log_prob": ("gaussian", "squared"),
    "loss.log_prob_reduction": ("mean", "sum"),
    "loss.step_reduction": ("mean", "sum"),
    "trust_region.kind": ("none", "fixed", "stepwise", "moving", "dual", "fixed_stepwise"),
    "trust_region.feedback": ("tighten", "paper", "none"),
    "trust_region.previous_estimator": ("closed_form", "log_ratio"),
    "trust_region.kl_time_weight": ("uniform", "equalized", "step_length"),
}


def check(config: schema.Config) -> None:
    """Refuses a recipe with a choice that has no formula here.

    Raises:
      ValueError: naming `config.debug.shadow`, the field, its value and what is allowed.
    """
    for path, known in _WRITTEN_OUT.items():
        value = operator.attrgetter(path)(config)
        if value not in known:
            raise ValueError(
                f"config.debug.shadow: got True with {path}={value!r}, which it has no formula of "
                f"its own for; allowed: {path} {', '.join(known)}, or False"
            )


# Transitions


def variance(kind: str, sigma: Any, sigma_next: Any, eta: float, clamp: float = 0.0) -> Any:
    """Of the noise that a step injects, as the papers print it; any shape."""
    if kind == "precise":
        # App. A.2 integrates σ/(1 - σ) over the step, with both ends clamped away from σ = 1.
        lowest = float(np.float32(clamp)) or _CLAMP
        start, end = jnp.maximum(1 - sigma, lowest), jnp.maximum(1 - sigma_next, lowest)
        inside = eta**2 * (jnp.log(end / start) - (end - start))
        return jnp.where(end - start > _NO_LENGTH, inside, 0.0)
    if kind == "flow":
        # At σ = 1 its diffusion coefficient is infinite; Flow-GRPO takes the next σ there.
        distance = jnp.where(sigma >= 1, 1 - sigma_next, 1 - sigma)
        distance = jnp.maximum(1 - sigma, clamp) if clamp else distance
        return eta**2 * sigma / distance * (sigma - sigma_next)
    if kind == "dance":
        return eta**2 * (sigma - sigma_next)
    if kind == "cps":
        return (sigma_next * math.sin(eta * math.pi / 2)) ** 2
    raise ValueError(f"kind={kind!r}: must be one of {', '.join(_WRITTEN_OUT['rollout.sde'])}")


def transition(
    kind: str,
    velocity: Any,
    sample: Any,
    sigma: Any,
    sigma_next: Any,
    eta: float,
    clamp: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(mean, std) of a step as the papers print it, see `flow.sde.transition`."""
    clean, predicted_noise = sample - sigma * velocity, sample + (1 - sigma) * velocity
    injected = variance(kind, sigma, sigma_next, eta, clamp)
    if kind == "cps":
        # Flow-CPS turns the predicted noise towards a fresh one; x̂0 stays where it is.
        turned = sigma_next * (math.cos(eta * math.pi / 2) * predicted_noise)
        return (1 - sigma_next) * clean + turned, jnp.sqrt(injected)
    # An Euler-Maruyama step of the SDE with the same marginals goes half the variance along the
    # score.
    score = -predicted_noise / sigma
    mean = sample + (sigma_next - sigma) * velocity + injected * score / 2
    return mean, jnp.sqrt(injected)


def log_prob(loss: schema.LossConfig, sample: Any, mean: Any, std: Any) -> jax.Array:
    """Log-probability [m] up to constants that do not depend on the mean."""
    # Flow-CPS leaves the std out of the exponent.
    squares = -((sample - mean) ** 2)
    return reduced(loss, squares if loss.log_prob == "squared" else squares / (2 * std**2))


def policy_loss(loss: schema.LossConfig, log_ratio: Any, advantages: Any) -> jax.Array:
    """The loss [m] of every sample, before the time weight."""
    if loss.objective == "reinforce":
        return -advantages * log_ratio
    ratio = jnp.exp(log_ratio)
    # PPO takes the worse of the two for whoever maximises.
    clipped = jnp.clip(ratio, 1 - loss.clip_range, 1 + loss.clip_range)
    return -jnp.minimum(advantages * ratio, advantages * clipped)


def reduced(loss: schema.LossConfig, values: Any) -> jax.Array:
    """[m, ...] -> [m], by the mean or the sum over the elements of a sample."""
    axes = tuple(range(1, values.ndim))
    return values.sum(axes) if loss.log_prob_reduction == "sum" else values.mean(axes)


# Steps and their weights


def noisy_steps(config: schema.Config, sigmas: np.ndarray) -> np.ndarray:
    """The steps that can inject noise, ascending; `sigmas` is float64 [T + 1]."""
    rollout = config.rollout
    with jax.enable_x64(True):
        found = variance(rollout.sde, sigmas[:-1], sigmas[1:], rollout.eta, rollout.clamp)
    steps = np.flatnonzero(np.asarray(found) > 0)
    last = len(sigmas) - 2
    return steps[steps < last] if rollout.last_step == "deterministic" else steps


def window_and_positions(config: schema.Config, noisy: np.ndarray) -> tuple[int, int]:
    """(steps of a window, how many of them a sample is trained at)."""
    window = config.rollout.window_size or len(noisy)
    return window, math.floor(window * config.rollout.trained_fraction + 1e-9)


def trained_steps(config: schema.Config, noisy: np.ndarray) -> np.ndarray:
    """The steps that some rollout trains, ascending: the median of the equalizer is over them."""
    rollout = config.rollout
    window, positions = window_and_positions(config, noisy)
    places = len(noisy) - window + 1
    # A window may begin at these places, counted in steps that can inject noise.
    starts = {"all": [0], "first_k": [0], "random_k": range(places)}.get(
        rollout.window, range(0, places, rollout.window_motion.stride)
    )
    length = positions if rollout.trained_choice == "first" else window
    return noisy[sorted({start + i for start in starts for i in range(length)})]


def step_weights(
    config: schema.Config, sigmas: np.ndarray, trained: np.ndarray, squared: bool
) -> np.ndarray:
    """S_t = median(N) / N_t, N_t = |∂mean/∂v| / std; float64 [T], 0 for untrained steps.

    With `squared` log-probabilities the gradient scale is |∂mean/∂v|·std.
    """
    rollout = config.rollout
    arguments = sigmas[trained], sigmas[trained + 1], rollout.eta, rollout.clamp
    with jax.enable_x64(True):
        # The mean is linear in the velocity.
        at_one, std = transition(rollout.sde, 1.0, 0.0, *arguments)
        at_zero, _ = transition(rollout.sde, 0.0, 0.0, *arguments)
        slope = np.abs(np.asarray(at_one - at_zero))

    # ∂ log π/∂v has the size λ/std for the Gaussian, λ·std for the squares, up to a constant.
    scale = slope * np.asarray(std) if squared else slope / np.asarray(std)
    ordered = np.sort(scale)
    middle = ordered[(len(ordered) - 1) // 2]  # torch.median: the lower of an even count
    weights = np.zeros(len(sigmas) - 1)
    weights[trained] = (np.median(scale) if config.loss.median == "mean" else middle) / scale
    return weights


def policy_weights(config: schema.Config, sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The weight of each step in the policy loss; float64 [T]."""
    weights = np.zeros(len(sigmas) - 1)
    weights[trained] = 1.0
    if config.loss.equalizer:
        squared = config.loss.log_prob == "squared"
        weights = step_weights(config, sigmas, trained, squared)
    if config.loss.step_reduction == "sum":  # everything else is a mean over the trained steps
        weights = weights * window_and_positions(config, noisy_steps(config, sigmas))[1]
    return weights


def kl_weights(config: schema.Config, sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The weight of each step in the KLs to the references; float64 [T]."""
    kind, weights = config.trust_region.kl_time_weight, np.zeros(len(sigmas) - 1)
    if kind == "equalized":
        return step_weights(config, sigmas, trained, squared=False) ** 2
    weights[trained] = (sigmas[:-1] - sigmas[1:])[trained] if kind == "step_length" else 1.0
    return weights


# The weight of the KL


class Controller:
    """λ by Eq. 41 and 42, from the counts of updates and the measured KLs alone.

    What happened before the first call is not known: a resumed run goes on from its λ.

    Args:
      region: the recipe's.
    """

    def __init__(self, region: TrustRegionConfig) -> None:
        self._region = region
        self._count: int | None = None
        self._weight = math.nan
        self._kls: collections.deque[float] = collections.deque(maxlen=region.history)

    def weight(self, count: int, history: np.ndarray, of_run: float) -> float:
        """λ of the next update.

        Args:
          count: applied updates.
          history: [H], the KL of update n (from 1) at (n - 1) mod H.
          of_run: the run's λ, where this one has not seen the updates before.
        """
        size, first = self._region.history, self._count is None
        # Of more than H updates at a time some KLs are overwritten.
        unknown = first or count - self._count > size or count < self._count
        start = max(0, count - size) if unknown else self._count
        weight = of_run if unknown else self._weight
        # One update after another: a rule that multiplies depends on the order.
        for n in range(start + 1, count + 1):
            self._kls.append(float(history[(n - 1) % size]))
            if not unknown:
                weight = self._steered(weight, n)
        if (ramp := self._ramp(count)) is not None:
            weight = ramp
        self._count, self._weight = count, weight
        return weight

    def _ramp(self, count: int) -> float | None:
        """Eq. 41; None once feedback steers."""
        region = self._region
        if region.kind == "none":
            return 0.0
        if count > region.warmup_steps and region.feedback != "none":
            return None
        share = min(1.0, count / region.warmup_steps) if region.warmup_steps else 1.0
        return region.initial_weight + (region.final_weight - region.initial_weight) * share

    def _steered(self, weight: float, count: int) -> float:
        """Eq. 42, in the direction that the config asks for."""
        region = self._region
        if (ramp := self._ramp(count)) is not None:
            return ramp
        # As Eq. 42 is printed a high KL lowers the weight; a trust region needs the other
        # direction.
        target, measured = region.target_shift**2 / 2, float(np.mean(self._kls))
        raise_it, lower_it = region.up, region.down
        if region.feedback == "paper":
            raise_it, lower_it = lower_it, raise_it
        if measured > region.high * target:
            weight *= raise_it
        elif measured < region.low * target:
            weight *= lower_it
        return min(max(weight, region.min_weight), region.max_weight)
