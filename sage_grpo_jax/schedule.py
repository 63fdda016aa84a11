"""Prints what a recipe's sampler does at every step, before anything is spent on it.

    python -m sage_grpo_jax.schedule --config=configs/moving_shapes.py:method=sage

Columns: sigma -> sigma_next of the step; std of the injected noise; excess, how much more variance
than the marginal a clip has after the step, were the data a single point, in units of sigma_next^2;
N, the scale of the gradient; S, its weight in the loss; share of the whole gradient, S N. With a
window at a random place, injected std, excess and share are expectations over its places.
"""

import json

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.flow import excess, injected_noise
from sage_grpo_jax.grpo import equalizer
from sage_grpo_jax.training import command_line
from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import recipe as recipe_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Recipe, with an argument behind a colon.", lock_config=True
)
flags.mark_flag_as_required(_CONFIG)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def describe(config: config_lib.Config) -> dict[str, object]:
    """Everything that is printed, by name; lists have one entry a step.

    With a window at a random place, `injected_std`, `excess` and `share` are those of the mean over
    its places; `coverage` is the share of the places at which the step injects noise, and `std`,
    `N` and `S` are those of a step that does.

    Raises:
      ValueError: a recipe without a stochastic step.
    """
    rollout = config.rollout
    schedule, trained, positions = recipe_lib.trained_steps(config)
    sigmas = np.asarray(schedule.sigmas, np.float64)
    weights = recipe_lib.step_weights(config, schedule, trained)
    scale = equalizer.gradient_scale(
        rollout.sde, schedule, rollout.eta, log_prob=config.loss.log_prob
    )
    places = injected_noise.window_places(trained, rollout.window, positions)
    coverage = places.mean(axis=0)
    gradient = coverage * weights * scale
    stds = excess.point_mass(rollout.sde, schedule, rollout.eta, trained).stds
    chains = [excess.point_mass(rollout.sde, schedule, rollout.eta, place) for place in places]
    return {
        "method": config.method,
        "sde": rollout.sde,
        "eta": rollout.eta,
        "trained_steps": positions,
        "window_places": len(places),
        "injected_std": float(np.sqrt(np.sum(coverage * stds**2))),
        "sigma": sigmas[:-1].tolist(),
        "sigma_next": sigmas[1:].tolist(),
        "coverage": coverage.tolist(),
        "std": stds.tolist(),
        "excess": np.mean([chain.excess for chain in chains], axis=0).tolist(),
        "N": np.where(trained, scale, 0.0).tolist(),
        "S": weights.astype(float).tolist(),
        "share": (gradient / gradient.sum()).tolist(),
    }


def table(values: dict[str, object]) -> str:
    """The description as text."""
    lines = [
        f"method {values['method']}: {values['sde']}, eta {values['eta']:.4g}, "
        f"{values['trained_steps']} trained steps a sample, injected std "
        f"{values['injected_std']:.4g} (root of the summed variances)",
    ]
    columns = {"sigma": 8, "next": 8, "std": 8, "excess": 8, "N": 9, "S": 9, "share": 7}
    if values["window_places"] > 1:
        lines.append(
            f"expected over the {values['window_places']} places of the random window: injected "
            "std, excess, share; covered: places with the step in the window; std, N, S: in it"
        )
        columns["covered"] = 8
    lines.append(f"{'step':>4} " + " ".join(f"{name:>{width}}" for name, width in columns.items()))
    names = ("sigma", "sigma_next", "std", "excess", "N", "S", "share", "coverage")
    for step, row in enumerate(zip(*(values[name] for name in names), strict=True)):
        sigma, sigma_next, std, excess_, n, s, share, coverage = row
        line = (
            f"{step:>4} {sigma:>8.4f} {sigma_next:>8.4f} {std:>8.4f} {excess_:>8.4f} {n:>9.4g} "
            f"{s:>9.4g} {100 * share:>6.1f}%"
        )
        lines.append(line + (f" {100 * coverage:>7.1f}%" if "covered" in columns else ""))
    return "\n".join(lines)


def main() -> None:
    """Prints the description."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with a run
    values = describe(config_lib.from_config_dict(_CONFIG.value))
    print(json.dumps(values, indent=2) if _JSON.value else table(values))


if __name__ == "__main__":
    command_line.run(main)
