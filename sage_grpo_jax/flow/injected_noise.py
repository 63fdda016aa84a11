"""How much noise a sampler injects, in which steps, and the eta that injects as much as another."""

from __future__ import annotations

import math

import numpy as np

from sage_grpo_jax.flow import sde, windows
from sage_grpo_jax.flow.schedules import Schedule


def injected_variance(
    kind: str,
    schedule: Schedule,
    eta: float,
    last_step: str = "deterministic",
    window: str = "all",
    window_size: int = 0,
    *,
    motion: windows.Motion | None = None,
    clamp: float = 0.0,
) -> float:
    """Returns the sum of std² over the steps that inject noise, in float64, on the host.

    With a random or moving window it is the mean over the rollouts; see `windows.places`.
    """
    sigmas = np.asarray(schedule.sigmas, np.float64)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    _, std = sde.step_coefficients(kind, sigma, sigma_next, float(eta), clamp=clamp, xp=np)
    stochastic = sde.stochastic_steps(kind, schedule, eta, last_step, clamp=clamp)
    # Each place counts by its share of the rollouts: [places] @ bool [places, T] -> [T].
    masks, shares = windows.places(stochastic, window, window_size, motion)
    return float(np.sum((shares @ masks) * std**2))


def matched_eta(
    kind: str,
    schedule: Schedule,
    other_kind: str,
    other_eta: float,
    last_step: str = "deterministic",
    window: str = "all",
    window_size: int = 0,
    *,
    motion: windows.Motion | None = None,
    clamp: float = 0.0,
) -> float:
    """Returns the η at which `kind` injects as much variance as `other_kind` does at `other_eta`.

    η means different things for different kinds and step counts; this makes them comparable. Each
    kind is taken over its own stochastic steps in the window; `clamp` is that of `kind`, the other
    has its authors'.

    Raises:
      ValueError: no η gives that much noise, or one of the kinds has no stochastic step.
    """

    def variance_of(kind: str, eta: float, clamp: float) -> float:
        return injected_variance(
            kind, schedule, eta, last_step, window, window_size, motion=motion, clamp=clamp
        )

    # The variance is that at η = 1 times a number that η alone decides, the same for all steps.
    at_one, wanted = variance_of(kind, 1.0, clamp), variance_of(other_kind, other_eta, 0.0)
    for name, eta, variance in ((kind, 1.0, at_one), (other_kind, other_eta, wanted)):
        if variance == 0.0:
            raise ValueError(
                f"kind={name!r} with eta={eta} has no stochastic step in {len(schedule.timesteps)} "
                f"steps with last_step={last_step!r}, so there is no noise to match; allowed: "
                "another kind, or more steps"
            )

    entry = sde.KINDS[kind]
    if entry.highest_eta < math.inf:
        highest = variance_of(kind, entry.highest_eta, clamp)
        if wanted > highest:
            raise ValueError(
                f"kind={kind!r} injects a variance of at most {highest:.3g} over the schedule; "
                f"kind={other_kind!r} with eta={other_eta} injects {wanted:.3g}"
            )
    return entry.eta_of_std(math.sqrt(wanted / at_one))
