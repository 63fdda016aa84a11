"""Prints what a recipe's sampler does at every step, before anything is spent on it.

    python -m sage_grpo_jax.schedule --config=configs/moving_shapes.py:method=sage

Columns: sigma -> sigma_next of the step; std of the injected noise; excess, how much more variance
than the marginal a clip has after the step, were the data a single point, in units of sigma_next^2;
N, the scale of the gradient; S, its weight in the loss; share of the whole gradient, S N. With a
window at a random or moving place, injected std, excess and share are means over the rollouts; so
is share where every sample draws the steps that it is trained at.
"""

import json

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.common import command_line
from sage_grpo_jax.config import builder, schema, step_plan
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.flow import excess, windows
from sage_grpo_jax.grpo import equalizer

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Recipe, with an argument behind a colon.", lock_config=True
)
flags.mark_flag_as_required(_CONFIG)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def describe(config: schema.Config) -> dict[str, object]:
    """Everything that is printed, by name; lists have one entry a step.

    With a window at a random or moving place, `injected_std`, `excess` and `share` are those of the
    mean over the rollouts; `coverage` is the share of the rollouts in which the step injects noise,
    `trained` the share of the samples that are trained at it, and `std`, `N` and `S` are those of a
    step that does. The forward process (`loss.objective=nft`) has no `N`.

    Raises:
      ValueError: a recipe without a stochastic step.
    """
    # What the plan says of the steps: their noise levels, weights S and gradient scales N; [T].
    rollout, plan = config.rollout, step_plan.plan_steps(config)
    sigmas = np.asarray(plan.schedule.sigmas, np.float64)
    weights = plan_lib.step_weights(config, plan)
    arguments = (rollout.sde, plan.schedule, rollout.eta)
    scale = equalizer.gradient_scale(*arguments, log_prob=config.loss.log_prob, clamp=rollout.clamp)

    # Every place of the window, bool [places, T], and the share of rollouts that have it there.
    masks, shares = windows.places(plan.counted, rollout.window, plan.window, rollout.window_motion)
    coverage = shares @ (masks & plan.noisy)
    trained = shares @ (masks & plan.trained & (np.cumsum(masks, axis=1) <= plan.positions))
    if plan.draws:
        trained = (shares @ masks) * plan.positions / plan.window

    # How much of the gradient comes from each step; the forward process has no N.
    gradient = trained * weights * (1.0 if config.loss.objective == "nft" else scale)

    # Closed forms for data in one point, with the noise of each place. The std of a step is the
    # same in all places that hold it.
    chains = [
        excess.point_mass(*arguments, place & plan.noisy, clamp=rollout.clamp) for place in masks
    ]
    stds = excess.point_mass(*arguments, plan.noisy, clamp=rollout.clamp).stds

    return {
        "method": config.method,
        "sde": rollout.sde,
        "eta": rollout.eta,
        "trained_steps": plan.positions,
        "window": rollout.window,
        "window_places": plan.window_places,
        "injected_std": float(np.sqrt(np.sum(coverage * stds**2))),
        "sigma": sigmas[:-1].tolist(),
        "sigma_next": sigmas[1:].tolist(),
        "coverage": coverage.tolist(),
        "trained": trained.tolist(),
        "std": stds.tolist(),
        "excess": (shares @ [chain.excess for chain in chains]).tolist(),
        "N": np.where(plan.trained, scale, 0.0).tolist(),
        "S": weights.astype(float).tolist(),
        "share": (gradient / gradient.sum()).tolist(),
    }


def table(values: dict[str, object]) -> str:
    """The description as text."""
    # What holds for the whole recipe.
    lines = [
        f"method {values['method']}: {values['sde']}, eta {values['eta']:.4g}, "
        f"{values['trained_steps']} trained steps a sample, injected std "
        f"{values['injected_std']:.4g} (root of the summed variances)",
    ]

    # Columns and their widths; the last two only where they say something.
    columns = {"sigma": 8, "next": 8, "std": 8, "excess": 8, "N": 9, "S": 9, "share": 7}
    if values["window_places"] > 1:
        kind = "random" if values["window"] == "random_k" else values["window"]
        lines.append(
            f"expected over the {values['window_places']} places of the {kind} window: injected "
            "std, excess, share; covered: rollouts with the step in the window; std, N, S: in it"
        )
        columns["covered"] = 8
    shown = "covered" in columns
    if not np.allclose(values["trained"], values["coverage"]):
        lines.append("trained: samples that are trained at the step")
        columns["trained"] = 8

    # A line for each step.
    lines.append(f"{'step':>4} " + " ".join(f"{name:>{width}}" for name, width in columns.items()))
    names = ("sigma", "sigma_next", "std", "excess", "N", "S", "share", "coverage", "trained")
    for step, row in enumerate(zip(*(values[name] for name in names), strict=True)):
        sigma, sigma_next, std, excess_, n, s, share, coverage, trained = row
        line = (
            f"{step:>4} {sigma:>8.4f} {sigma_next:>8.4f} {std:>8.4f} {excess_:>8.4f} {n:>9.4g} "
            f"{s:>9.4g} {100 * share:>6.1f}%"
        )
        line += f" {100 * coverage:>7.1f}%" if shown else ""
        lines.append(line + (f" {100 * trained:>7.1f}%" if "trained" in columns else ""))
    return "\n".join(lines)


def main() -> None:
    """Prints the description."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with a run
    values = describe(builder.from_config_dict(_CONFIG.value))
    print(json.dumps(values, indent=2) if _JSON.value else table(values))


if __name__ == "__main__":
    command_line.run(main)
