"""Prints the tables of docs/samplers.md: how far each sampler leaves the marginals of the flow.

    python benchmarks/samplers.py

Closed forms in float64 (`sage_grpo_jax.flow.excess`); takes seconds.
"""

from __future__ import annotations

import numpy as np

from sage_grpo_jax.flow import excess, injected_noise, schedules

KINDS = ("ode", "precise", "flow", "dance", "cps")
STEPS = (10, 20, 40, 80, 160, 640, 2560)
SHIFT, ETA = 5.0, 0.5


def stochastic(steps: int) -> np.ndarray:
    """All steps but the last, which is clean."""
    return np.arange(steps) < steps - 1


def variance_error(kind: str, steps: int, eta: float, std: float) -> float:
    """Relative error of the final variance, for data N(0, std²)."""
    schedule = schedules.host_schedule(steps, SHIFT)
    found = excess.gaussian_data(kind, schedule, eta, stochastic(steps), std=std)
    return found.variances[-1] / std**2 - 1


def print_gaussian(std: float, eta_of) -> None:
    print(f"| T | {' | '.join(KINDS)} |")
    print("|---" * (len(KINDS) + 1) + "|")
    for steps in STEPS:
        errors = [variance_error(kind, steps, eta_of(kind, steps), std) for kind in KINDS]
        print(f"| {steps} | " + " | ".join(f"{100 * e:+.2f} %" for e in errors) + " |")

    # The slope over the last two rows: 1 where the error halves with the step.
    last = [
        [abs(variance_error(kind, steps, eta_of(kind, steps), std)) for steps in STEPS[-2:]]
        for kind in KINDS
    ]
    ratio = np.log(STEPS[-1] / STEPS[-2])
    orders = [np.log(a / b) / ratio for a, b in last]
    print("| order | " + " | ".join(f"{order:.2f}" for order in orders) + " |\n")


def matched(kind: str, steps: int) -> float:
    """The eta at which a kind injects the variance of `precise` at ETA."""
    if kind == "ode":
        return 0.0
    return injected_noise.matched_eta(kind, schedules.host_schedule(steps, SHIFT), "precise", ETA)


def print_point_mass(eta_of) -> None:
    kinds = ("precise", "flow", "dance", "cps")
    print(f"| T | {' | '.join(kinds)} |")
    print("|---" * (len(kinds) + 1) + "|")
    for steps in (10, 20, 40, 80):
        schedule = schedules.host_schedule(steps, SHIFT)
        found = [excess.point_mass(k, schedule, eta_of(k, steps), stochastic(steps)) for k in kinds]
        # Plus 0.0 and rounded before: -1e-16 is not printed as -0.000.
        values = [round(float(f.excess[-2]), 3) + 0.0 for f in found]
        print(f"| {steps} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    print()


def exact_schedule(steps: int) -> schedules.Schedule:
    """In float64: steps of 1e-6 are lost in the rounding of the schedule that samplers run on."""
    u = np.linspace(1.0, 0.0, steps + 1)
    sigmas = SHIFT * u / (1.0 + (SHIFT - 1.0) * u)
    return schedules.Schedule(sigmas, schedules.TIMESTEP_SCALE * sigmas[:-1])


def print_many_steps() -> None:
    """What is left of the noise of flow's first step, whose std is eta at every T."""
    print("| T | precise, eta 0.5 | flow, eta 0.5 | flow, eta 1 |\n|---|---|---|---|")
    for steps in (640, 2560, 5_000, 10_000, 100_000, 1_000_000):
        found = [
            excess.gaussian_data(kind, exact_schedule(steps), eta, stochastic(steps)).variances[-1]
            for kind, eta in (("precise", 0.5), ("flow", 0.5), ("flow", 1.0))
        ]
        print(f"| {steps:,} | " + " | ".join(f"{100 * (v - 1):+.5f} %" for v in found) + " |")
    print()


def main() -> None:
    print(f"Shift {SHIFT}, eta {ETA}, clean last step.\n")
    print("Point data: excess variance before the last step, in units of sigma'^2\n")
    print_point_mass(lambda kind, steps: ETA)
    print("The same at matched noise\n")
    print_point_mass(matched)
    for std in (1.0, 0.3):
        print(f"Data N(0, {std}^2): error of the final variance, every kind at eta {ETA}\n")
        print_gaussian(std, lambda kind, steps: ETA)
    print("Data N(0, 1): the same, many steps\n")
    print_many_steps()
    print(f"Data N(0, 1): the same at matched noise, the total variance of precise at eta {ETA}\n")
    print_gaussian(1.0, matched)


if __name__ == "__main__":
    main()
