"""How far a sampler leaves the marginals of the flow, in closed form (float64, on the host).

Where the exact velocity is linear in x, a step maps a Gaussian to a Gaussian, and mean and variance
follow a scalar recursion. Two cases: all data at one point, and Gaussian data N(m, s²).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sage_grpo_jax.flow import sde
from sage_grpo_jax.flow.schedules import Schedule


class Marginals(NamedTuple):
    """What the chain has after each of T steps, against the true marginal."""

    stds: np.ndarray  # f64[T], of the noise that the step injected; 0 where deterministic
    means: np.ndarray  # f64[T]
    variances: np.ndarray  # f64[T]
    true_means: np.ndarray  # f64[T]: (1 - σ')·m
    true_variances: np.ndarray  # f64[T]: (1 - σ')²·s² + σ'²

    @property
    def excess(self) -> np.ndarray:
        """(variance - true variance)/σ'² for point data, 0 where the true variance is 0."""
        difference = self.variances - self.true_variances
        nonzero = self.true_variances > 0
        return np.where(nonzero, difference / np.where(nonzero, self.true_variances, 1.0), 0.0)


def gaussian_data(
    kind: str,
    schedule: Schedule,
    eta: float,
    stochastic: np.ndarray,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    clamp: float = 0.0,
) -> Marginals:
    """Runs the recursion for data N(mean, std²), from the exact state at σ = 1.

    The exact velocity is v(x) = E[z - x0 | x] = (1/V)(σ - (1-σ)·s²)·(x - (1-σ)·m) - m with
    V = (1-σ)²·s² + σ², and a step is x' = x + dt·v - removed·(x + (1-σ)·v) + std·ε: linear in x.

    Args:
      kind, eta: of the stochastic steps, see `sde.transition`; the others follow the ODE.
      schedule: T steps, concrete.
      stochastic: bool[T].
      mean, std: of the data; std 0 for data at one point.
      clamp: see `sde.step_coefficients`.
    """
    sigmas = np.asarray(schedule.sigmas, np.float64)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    removed, noise = sde.step_coefficients(kind, sigma, sigma_next, float(eta), clamp=clamp, xp=np)
    removed, noise = np.where(stochastic, removed, 0.0), np.where(stochastic, noise, 0.0)
    # A step subtracts λ_t·v where it injects noise, and its length times v in the ODE.
    sensitivity = np.where(
        stochastic,
        sde.velocity_sensitivity(kind, sigma, sigma_next, float(eta), clamp=clamp, xp=np),
        sigma - sigma_next,
    )

    # The exact velocity, v = slope·x + offset
    total = (1 - sigma) ** 2 * std**2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / total
    offset = -slope * (1 - sigma) * mean - mean

    # A step, E[x'] = factor·x + shift
    factor, shift = 1 - removed - sensitivity * slope, -sensitivity * offset

    # The step is a linear map: the mean follows it, and the variance its square, plus the noise.
    means, variances = [], []
    state = (0.0, 1.0)
    for a, b, n in zip(factor, shift, noise, strict=True):
        state = (a * state[0] + b, a**2 * state[1] + n**2)
        means.append(state[0])
        variances.append(state[1])

    return Marginals(
        stds=noise,
        means=np.array(means),
        variances=np.array(variances),
        true_means=(1 - sigma_next) * mean,
        true_variances=(1 - sigma_next) ** 2 * std**2 + sigma_next**2,
    )


def point_mass(
    kind: str, schedule: Schedule, eta: float, stochastic: np.ndarray, *, clamp: float = 0.0
) -> Marginals:
    """`gaussian_data` for data at the point 0: every bit of variance beyond σ'² is excess."""
    return gaussian_data(kind, schedule, eta, stochastic, std=0.0, clamp=clamp)
