"""The importance ratio: which policy it is taken to, and how far the rollout was from that policy.

Rollout and update are compiled apart and round apart, in bfloat16 by far more than a clip range. So
the old means are those of the update program itself, never those of the rollout: with one update a
rollout the new means without their gradient, which makes the ratio exactly 1 in any precision; with
several the means that the first pass records for the later ones. The gradient is then ε·∂δ with the
ε that the rollout drew.

How far the rollout's own means lie from the old ones is measured in every update. It is a metric
and a gate (a rollout of other parameters or other noise is refused), and no part of the gradient.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sage_grpo_jax.config import schema
from sage_grpo_jax.config.plan import Plan
from sage_grpo_jax.flow import rollout as rollout_lib
from sage_grpo_jax.flow import sde
from sage_grpo_jax.parallel import sharding

# Of `loss.rollout_tolerance`, where it is 0. Measured: docs/precision.md.
FULL_PRECISION_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.5


class NumericsError(RuntimeError):
    """The run can't go on in these numerics; nothing was applied."""


class OldMeans(NamedTuple):
    """The means that the first update of a rollout records for the later ones."""

    # float32 [N, m, ...]: N micro-batches of m samples, in the order of the scan. Before the first
    # update it holds nothing; None where the loss has no ratio.
    means: jax.Array | None
    turn: jax.Array  # int32 []: updates that were made on the rollout

    @property
    def known(self) -> jax.Array:
        """Whether there was a first update; bool []."""
        return self.turn > 0


class Mismatch(NamedTuple):
    """How far the rollout's means lie from the old ones; the largest of the samples at each step.

    -inf where no sample is trained at a step.
    """

    ratio: jax.Array  # float32 [T]: |ratio - 1| that the rollout's means would have given
    shift: jax.Array  # float32 [T]: root mean square over the elements, in std of the step


class Tolerances(NamedTuple):
    """The limits of the gate, float32 []."""

    ratio: Any  # of |ratio - 1|
    shift: Any  # of `Mismatch.shift`


def old_mean(mean: jax.Array, recorded: jax.Array | None, known: jax.Array | None) -> jax.Array:
    """The mean [m, ...] that the ratio is taken to, without gradient.

    Args:
      mean: of the policy in this pass.
      recorded: of the first pass; None with one update a rollout.
      known: whether there was a first pass.
    """
    current = jax.lax.stop_gradient(mean)
    return current if recorded is None else jnp.where(known, recorded, current)


def log_ratio(
    plan: Plan, noise: jax.Array, mean: jax.Array, mean_old: jax.Array, std: jax.Array
) -> jax.Array:
    """log π(x')/π_old(x') [m] at x' = mean_old + std·noise, in the form that the recipe names."""
    loss = plan.config.loss
    return sde.log_ratio(
        noise, mean, mean_old, std, log_prob=loss.log_prob, reduction=loss.log_prob_reduction
    )


def rollout_log_ratio(
    plan: Plan, noise: jax.Array, mean: jax.Array, next_latents: jax.Array, std: jax.Array
) -> jax.Array:
    """log of `mean`'s probability of x' over that of the rollout's mean x' - std·noise; [m]."""
    rollout_mean = rollout_lib.behaviour_mean(next_latents, noise, std)
    return log_ratio(plan, noise, mean, rollout_mean, std)


def no_mismatch(plan: Plan) -> Mismatch:
    """Of no sample: what `jnp.maximum` over micro-batches starts from."""
    nothing = jnp.full(plan.trained.shape, -jnp.inf, jnp.float32)
    return Mismatch(nothing, nothing)


def mismatch(
    plan: Plan,
    step: jax.Array,
    valid: jax.Array,
    noise: jax.Array,
    mean_old: jax.Array,
    next_latents: jax.Array,
    std: jax.Array,
) -> Mismatch:
    """The mismatch of a micro-batch of m samples.

    Args:
      plan: the constants.
      step: int32 [] or [m].
      valid: bool [m]; the others do not count, whatever they hold.
      noise: that the rollout drew, [m, ...].
      mean_old: of the update program, [m, ...].
      next_latents: x' of the rollout, [m, ...].
      std: of the step.
    """
    # This is |ratio - 1|. Near 1 the difference would have no digits left; expm1 has all of them.
    deviation = jnp.abs(jnp.expm1(rollout_log_ratio(plan, noise, mean_old, next_latents, std)))
    rollout_mean = rollout_lib.behaviour_mean(next_latents, noise, std)
    delta = sde.standardized_difference(mean_old, rollout_mean, std)
    shift = jnp.sqrt(sde.reduce_elements(delta**2))

    # The largest of each step shows where in the schedule the two programs part.
    steps = jnp.broadcast_to(step, valid.shape)[:, None]
    counts = (steps == jnp.arange(plan.trained.size)) & valid[:, None]  # [m, T]

    def largest(values: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(counts, values[:, None], -jnp.inf), axis=0)

    return jax.lax.stop_gradient(Mismatch(largest(deviation), largest(shift)))


def mismatch_metrics(found: Mismatch) -> dict[str, jax.Array]:
    """The mismatch of a rollout by name; the entry of the steps [T] is NaN where there is none."""
    return {
        "ratio/rollout_mismatch": jnp.maximum(jnp.max(found.ratio), 0.0),
        "ratio/rollout_mismatch/step": jnp.where(found.ratio == -jnp.inf, jnp.nan, found.ratio),
        "ratio/rollout_shift": jnp.maximum(jnp.max(found.shift), 0.0),
    }


def in_tolerance(
    metrics: Mapping[str, jax.Array], tolerances: Tolerances, old: OldMeans | None
) -> jax.Array:
    """Whether an update may be applied, by the gate; bool []."""
    # NaN is not below any limit: means that are not finite are refused too.
    found = (metrics["ratio/max_deviation"] <= tolerances.ratio) & (
        metrics["ratio/rollout_shift"] <= tolerances.shift
    )
    # The later updates of a rollout are meant to move the ratio.
    return found if old is None else found | old.known


def abstract_old_means(plan: Plan, mesh: jax.sharding.Mesh) -> OldMeans | None:
    """`OldMeans` as shapes with shardings; None with one update a rollout, which needs none."""
    config = plan.config
    if config.loss.updates_per_rollout == 1:
        return None

    # The means are as large as the trained part of the trajectory, and divided over the mesh as it
    # is, here along axis 1.
    count = plan.positions * (config.batch_size // config.loss.micro_batch)
    shape = (count, config.loss.micro_batch, *plan.latent_shape)
    means = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.batch_sharding(mesh, 1))
    turn = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return OldMeans(None if plan.is_forward else means, turn)


# The gate, on the host


@dataclasses.dataclass(frozen=True)
class Gate:
    """What the first update of a rollout must pass; the program applies it, the host judges it.

    Attributes:
      ratio: the largest |ratio - 1|, `loss.ratio_tolerance`.
      shift: the largest `Mismatch.shift`, `loss.rollout_tolerance` or what the precision allows.
      applies_anyway: `loss.ratio_action=log`: what lies above a limit is applied all the same.
    """

    ratio: float
    shift: float
    applies_anyway: bool

    @classmethod
    def of(cls, config: schema.Config) -> "Gate":
        """The gate of a run."""
        loss = config.loss
        shift = loss.rollout_tolerance or _tolerance_of_precision(config.model)
        return cls(loss.ratio_tolerance, shift, loss.ratio_action == "log")

    @property
    def limits(self) -> Tolerances:
        """What the update program compares with; infinite only where everything is applied."""
        if self.applies_anyway:
            return Tolerances(np.float32(np.inf), np.float32(np.inf))
        return Tolerances(np.float32(self.ratio), np.float32(self.shift))

    def check(self, values: Mapping[str, float]) -> None:
        """Judges the first update of a rollout by its metrics, as the program did before.

        Raises:
          NumericsError: the update was refused; where everything is applied, only what is not
            finite is refused.
        """
        deviation, shift = values["ratio/max_deviation"], values["ratio/rollout_shift"]
        ratio_text = (
            f"before the first update the ratio is off 1 by {deviation:.2e} "
            f"(config.loss.ratio_tolerance = {self.ratio:g})"
        )
        shift_text = (
            f"the rollout's means lie {shift:.2e} standard deviations of a step from those of the "
            f"update (config.loss.rollout_tolerance = {self.shift:g})"
        )

        if not values["update/ratio_in_tolerance"]:
            if not (np.isfinite(deviation) and np.isfinite(shift)):
                raise NumericsError(f"{ratio_text}; {shift_text}: the model's output is not finite")
            text = shift_text if shift > self.shift else ratio_text
            raise NumericsError(
                f"{text}: other parameters or other noise, or too coarse numerics. Nothing was "
                "applied. Allowed: a higher tolerance, or ratio_action=log (apply it all the same)"
            )

        if shift > self.shift:
            logging.log_every_n(logging.WARNING, "%s; ratio_action=log: applied", 50, shift_text)


def _tolerance_of_precision(model: schema.ModelConfig) -> float:
    full = model.compute_dtype == "float32" and model.matmul_precision != "default"
    return FULL_PRECISION_TOLERANCE if full else LOW_PRECISION_TOLERANCE
