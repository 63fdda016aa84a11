"""The table of ways to inject noise: one entry a kind, and nothing about a kind elsewhere.

Rectified flow: x_σ = (1 - σ)·x0 + σ·z, velocity v = z - x0, predicted noise x̂1 = x + (1 - σ)·v,
score s = -x̂1/σ. Every kind has the form

    mean = x + (σ' - σ)·v - removed·x̂1,      std,

the step of the probability-flow ODE, less the part of the predicted noise that is taken out to
make room for the fresh noise. An entry says what `removed` and `std` are, and what else there is to
know about them: transitions, log-probabilities, equalizer, matched η, and the choices and bounds of
recipes and flags follow from it. To add a kind, add an entry.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# `precise` never looks closer than this to σ = 1, where its variance integral diverges, unless
# another clamp is asked for.
CLAMP = 3e-3

# Below this z, z - log1p(z) comes from its series (the subtraction would cancel).
_SERIES_BELOW = 0.1
_SERIES_TERMS = 10


class StepCoefficients(NamedTuple):
    """What a kind does at one step: mean = x + (σ' - σ)·v - removed·x̂1, and std."""

    removed: Any
    std: Any


# coefficients(σ, σ', η, clamp, array module) of steps, element by element, any shape
Coefficients = Callable[[Any, Any, Any, float, ModuleType], StepCoefficients]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way of injecting noise: all that the rest of the project knows about it.

    Attributes:
      coefficients: of steps; a std below any that matters is rounded to 0 afterwards.
      highest_eta: the largest η that has a meaning, at least 1.
      stochastic: whether it injects noise at all.
      reads_clamp: whether its variance diverges at σ = 1, where a clamp keeps it finite.
      eta_of_std: the η of a given std, in units of the std at η = 1.
    """

    coefficients: Coefficients
    highest_eta: float = math.inf
    stochastic: bool = True
    reads_clamp: bool = False
    eta_of_std: Callable[[float], float] = lambda std: std

    def __post_init__(self) -> None:
        """Raises ValueError where η = 1, the unit of `eta_of_std`, is out of range."""
        if not self.highest_eta >= 1.0:
            raise ValueError(f"highest_eta={self.highest_eta!r}: must be at least 1")


def _euler_maruyama(variance: Callable[[Any, Any, float, ModuleType], Any]) -> Coefficients:
    """The step mean = x + dt·v + ½·std²·s, so removed = std²/(2σ); `variance` is std² at η = 1."""

    def coefficients(
        sigma: Any, sigma_next: Any, eta: Any, clamp: float, xp: ModuleType
    ) -> StepCoefficients:
        variance_at_one = xp.maximum(variance(sigma, sigma_next, clamp, xp), 0.0)
        # s = -x̂1/σ, so ½·std²·s takes std²/(2σ) of x̂1 out. At σ = 0 no step begins.
        removed = 0.5 * eta**2 * variance_at_one / xp.where(sigma > 0, sigma, 1.0)
        return StepCoefficients(removed, std=eta * _safe_sqrt(variance_at_one, xp))

    return coefficients


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
        # g² = η²·σ/(1 - σ) is infinite at σ = 1; Flow-GRPO divides by 1 - σ' there.
        distance = xp.where(sigma >= 1.0, 1.0 - sigma_next, 1.0 - sigma)
    return sigma * (sigma - sigma_next) / xp.where(distance > 0, distance, 1.0)


def _dance_variance(sigma: Any, sigma_next: Any, clamp: float, xp: ModuleType) -> Any:
    del clamp, xp
    return sigma - sigma_next


def _cps_coefficients(
    sigma: Any, sigma_next: Any, eta: Any, clamp: float, xp: ModuleType
) -> StepCoefficients:
    """The predicted noise is rotated: σ'·(cos(η·π/2)·x̂1 + sin(η·π/2)·ε) in place of σ'·x̂1."""
    del sigma, clamp
    # 1 - cos(θ) = 2·sin²(θ/2) keeps small η exact, and η = 0 exactly the ODE step.
    removed = 2.0 * sigma_next * xp.sin(0.25 * math.pi * eta) ** 2
    return StepCoefficients(removed, std=sigma_next * xp.sin(0.5 * math.pi * eta))


def _ode_coefficients(
    sigma: Any, sigma_next: Any, eta: Any, clamp: float, xp: ModuleType
) -> StepCoefficients:
    del eta, clamp
    zero = xp.zeros_like(sigma + sigma_next)
    return StepCoefficients(removed=zero, std=zero)


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


KINDS: dict[str, Kind] = {
    # SAGE-GRPO: the variance integrated over the step, both ends clamped.
    "precise": Kind(_euler_maruyama(_precise_variance), reads_clamp=True),
    # Flow-GRPO.
    "flow": Kind(_euler_maruyama(_flow_variance), reads_clamp=True),
    # DanceGRPO.
    "dance": Kind(_euler_maruyama(_dance_variance)),
    # Flow-CPS. η = 1 replaces all of the predicted noise.
    "cps": Kind(
        _cps_coefficients,
        highest_eta=1.0,
        eta_of_std=lambda std: 2.0 / math.pi * math.asin(std),
    ),
    # The Euler step of the probability-flow ODE.
    "ode": Kind(_ode_coefficients, stochastic=False),
}


def stochastic_kinds() -> tuple[str, ...]:
    """Returns the kinds that inject noise."""
    return tuple(name for name, kind in KINDS.items() if kind.stochastic)


def clamped_kinds() -> tuple[str, ...]:
    """Returns the kinds that read a clamp."""
    return tuple(name for name, kind in KINDS.items() if kind.reads_clamp)
