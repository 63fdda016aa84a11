"""`debug.shadow`: one micro-batch a step, recomputed in float64 on the CPU.

What the update computes (log-ratio, loss, gradient of one micro-batch) is compared with a second
computation that shares as little with it as it can:

  * the velocity is the same network, but every float32 or bfloat16 intermediate, also those that
    the layers ask for by name, is float64: the traced program is evaluated with wider types
    (`float64.in_float64`), so that no layer has to know about it;
  * everything else is written a second time from the papers in `shadow_formulas`, and the samples,
    steps, mask, normaliser, weights and λ of the micro-batch are worked out again from config and
    rollout: none of it is taken from the update.

Schedule, eta and the noise that was drawn are the float32 numbers of the run: the deviation is that
of the arithmetic, not of the inputs. The float32 side is the loss function of the update program,
compiled by itself. Meant for small runs: rollout, parameters and references go to the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.checks import float64, shadow_formulas
from sage_grpo_jax.config import schema
from sage_grpo_jax.config.plan import Plan
from sage_grpo_jax.flow import noise
from sage_grpo_jax.grpo import trust_region
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import micro_losses
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib


class Sides(NamedTuple):
    """What both computations of a micro-batch give."""

    log_ratio: Any  # [m], of the policy to the rollout
    loss: Any  # []
    gradient: Any  # tree of the trained parameters


class Shadow:
    """Recomputes a micro-batch and reports the deviation of the update's arithmetic.

    Raises:
      ValueError: a choice without a second formula, more than one process, or no CPU backend
        next to the accelerator.
    """

    def __init__(self, plan: Plan) -> None:
        shadow_formulas.check(plan.config)
        if jax.process_count() > 1:
            raise ValueError(
                f"config.debug.shadow: got True with {jax.process_count()} processes; allowed: one "
                "process (the parameters go to the host), or False"
            )
        try:
            device = jax.local_devices(backend="cpu")[0]
        except RuntimeError as error:
            raise ValueError(
                "config.debug.shadow: got True without a CPU backend; allowed: JAX_PLATFORMS that "
                "ends with ,cpu, or False"
            ) from error

        self._recipe = plan
        self._mesh = mesh_lib.make_mesh(1, 1, 1, devices=[device])
        self._float32 = jax.jit(functools.partial(_float32_side, plan))
        self._float64: Callable[[_Inputs], tuple[Sides, jax.Array]] | None = None
        self._controller = shadow_formulas.Controller(plan.config.trust_region)

    def __call__(
        self,
        state: state_lib.LearnerState,
        batch: update_lib.UpdateBatch,
        frozen: micro_losses.Frozen,
    ) -> dict[str, float]:
        """Deviations at the micro-batch whose turn it is; before the update, which donates `state`.

        Returns:
          shadow/log_ratio: largest |difference| of the log-ratios of policy and rollout; the
            rollout's own rounding is in both.
          shadow/loss: |difference| of the losses over the mean |A|·S_t plus the KL penalty: the
            loss itself is a sum of terms that cancel.
          shadow/gradient: norm of the difference over the norm of the float64 gradient.
        """
        plan = self._recipe
        pieces = plan.config.batch_size // plan.config.loss.micro_batch
        # Each step looks at another (position, piece), so that all of them have their turn. The
        # turn follows from the step: a resumed run goes on where the other would have.
        turn = int(state.step) % (plan.positions * pieces)
        position, piece = turn // pieces, turn % pieces

        # Both sides: float32 where the run computes, float64 on the CPU
        inputs = self._inputs(state, batch, frozen, position, piece)
        sides = self._float32(state, batch, frozen, np.int32(position), np.int32(piece))
        found = jax.device_get(sides)
        with jax.set_mesh(self._mesh):
            exact, scale = self._exact(inputs)
        return deviations(found, exact, scale)

    def _inputs(
        self,
        state: state_lib.LearnerState,
        batch: update_lib.UpdateBatch,
        frozen: micro_losses.Frozen,
        position: int,
        piece: int,
    ) -> _Inputs:
        """The micro-batch and its constants from config and rollout, on the host."""
        plan, config = self._recipe, self._recipe.config

        # Which samples, at which steps
        size = config.loss.micro_batch
        rows = np.arange(size) * (config.batch_size // size) + piece  # see `update.split_batch`
        sigmas = np.asarray(plan.schedule.sigmas, np.float64)
        noisy = shadow_formulas.noisy_steps(config, sigmas)
        trained = shadow_formulas.trained_steps(config, noisy)
        window, positions = shadow_formulas.window_and_positions(config, noisy)
        keys = batch.keys[rows]
        place = np.full(size, position)
        if config.rollout.trained_choice == "random":
            place = np.asarray(noise.chosen_steps(keys, window, positions))[:, position]
        step = noisy[np.asarray(batch.starts)[rows] + place]

        # A masked sample may hold NaN, and 0 · NaN in a sum is NaN: its latents count as 0.
        valid = np.asarray(batch.valid)
        latents = np.asarray(batch.latents)
        latents = latents.reshape(*latents.shape[:2], *plan.latent_shape)
        of_sample = valid[rows].reshape(-1, *[1] * (latents.ndim - 2))

        # λ, by the count and the measured KLs alone, and the references
        region = trust_region.find_state(state.opt_state)
        weight = self._controller.weight(
            int(region.count), np.asarray(region.history), float(region.weight)
        )
        references = [region.anchor] * config.trust_region.has_anchor
        references += [region.previous] * config.trust_region.has_previous

        return _Inputs(
            trained=jax.device_get(state.params),
            base=jax.device_get(frozen.base),
            negative=jax.device_get(frozen.negative),
            condition=jax.tree.map(lambda x: np.asarray(x)[rows], batch.condition),
            latents=np.where(of_sample, latents[step, rows], 0),
            next_latents=np.where(of_sample, latents[step + 1, rows], 0),
            noise=np.asarray(noise.step_noise(keys, step, plan.latent_shape)),
            advantages=np.asarray(batch.advantages)[rows],
            valid=valid[rows],
            step=step,
            weights=shadow_formulas.policy_weights(config, sigmas, trained)[step],
            kl_weights=shadow_formulas.kl_weights(config, sigmas, trained)[step],
            references=tuple(jax.device_get(references)),
            kl_weight=np.float64(weight),
            normalizer=np.float64(max(valid.sum() * positions, 1)),
        )

    def _exact(self, inputs: _Inputs) -> tuple[Sides, float]:
        if self._float64 is None:
            # Traced with the float32 inputs: the program of the network as the update has it.
            plan = self._recipe
            timestep = np.zeros(inputs.latents.shape[0], np.float32)
            network = inputs.trained, inputs.base, inputs.negative, inputs.condition
            program = _velocity_program(plan)
            velocity = float64.in_float64(program, *network, inputs.latents, timestep)
            self._float64 = jax.jit(lambda values: _float64_side(plan, velocity, values))
        with jax.enable_x64(True):
            wide = jax.tree.map(float64.widen, inputs)
            values = jax.device_put(wide, sharding.replicated(self._mesh))
            return jax.device_get(self._float64(values))


def deviations(found: Sides, exact: Sides, scale: float) -> dict[str, float]:
    """The metrics of `Shadow`; NaN on either side stays NaN. On the host, in float64."""
    log_ratio, wanted = np.asarray(found.log_ratio, np.float64), np.asarray(exact.log_ratio)

    pairs = zip(jax.tree.leaves(found.gradient), jax.tree.leaves(exact.gradient), strict=True)
    difference = wanted_norm = 0.0
    for ours, theirs in pairs:
        difference += float(np.sum((np.asarray(ours, np.float64) - theirs) ** 2))
        wanted_norm += float(np.sum(np.asarray(theirs, np.float64) ** 2))
    # All is 0 where no sample of the micro-batch has an advantage: then nothing may differ.
    tiny = np.finfo(np.float64).tiny
    return {
        "shadow/log_ratio": float(np.max(np.abs(log_ratio - wanted))),
        "shadow/loss": abs(float(found.loss) - float(exact.loss)) / max(float(scale), tiny),
        "shadow/gradient": math.sqrt(difference / max(wanted_norm, tiny)),
    }


class _Inputs(NamedTuple):
    """Everything that the float64 side needs; on the host. m samples, a step each."""

    trained: Any
    base: Any  # with LoRA the frozen weights, else None
    negative: Any
    condition: Any
    latents: np.ndarray  # x_t [m, ...]; 0 where not valid, as x_{t+1}
    next_latents: np.ndarray
    noise: np.ndarray  # [m, ...], as drawn in the rollout
    advantages: np.ndarray  # [m]
    valid: np.ndarray  # bool [m]
    step: np.ndarray  # integers [m]
    weights: np.ndarray  # of the policy loss, [m]
    kl_weights: np.ndarray  # [m]
    references: tuple[Any, ...]  # parameters
    kl_weight: np.ndarray  # λ
    normalizer: np.ndarray


def _float32_side(
    plan: Plan,
    state: state_lib.LearnerState,
    batch: update_lib.UpdateBatch,
    frozen: micro_losses.Frozen,
    position: jax.Array,
    piece: jax.Array,
) -> Sides:
    """The update's own loss, gradient and log-ratio at one micro-batch."""
    given = update_lib.loss_inputs(plan, state, frozen, jnp.sum(batch.valid))
    micro = update_lib.take_micro_batch(plan, batch, position, piece)

    # The ratio of the loss is 1 in a first pass and would tell nothing. So the ratio to the
    # rollout's own means is compared, which depends on every number of the transition.
    loss = functools.partial(micro_losses.policy_micro_loss, plan=plan)
    (total, _), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, micro, given)
    draw = noise.step_noise(micro.keys, micro.step, plan.latent_shape)
    new = micro_losses.transition(plan, state.params, micro, frozen)
    log_ratio = ratio_lib.rollout_log_ratio(plan, draw, new.mean, micro.next_latents, new.std)
    return Sides(jnp.where(micro.counts, log_ratio, 0.0), total, gradient)


def _velocity_program(plan: Plan) -> Callable[..., jax.Array]:
    """(trained, base, negative, condition, latents, timestep) -> velocity, as the update has it.

    With plain attention and nothing recomputed: what changes is how it runs.
    """
    transformer = dataclasses.replace(plan.transformer, attention="xla", remat=False)
    plan = dataclasses.replace(plan, transformer=transformer)

    def velocity(
        trained: Any,
        base: Any,
        negative: Any,
        condition: Any,
        latents: jax.Array,
        timestep: jax.Array,
    ) -> jax.Array:
        frozen = micro_losses.Frozen(negative, base)
        return micro_losses.velocity_fn(plan, trained, condition, frozen)(latents, timestep)

    return velocity


def _float64_side(
    plan: Plan, velocity: Callable[..., jax.Array], inputs: _Inputs
) -> tuple[Sides, jax.Array]:
    """The same quantities from the papers, and the scale that the loss is judged by."""
    config, rollout = plan.config, plan.config.rollout
    # σ is [m, 1, ..., 1] where it meets the latents of m samples.
    shape = (-1,) + (1,) * (inputs.latents.ndim - 1)
    sigmas = jnp.asarray(np.asarray(plan.schedule.sigmas, np.float64))
    sigma, sigma_next = (sigmas[inputs.step + i].reshape(shape) for i in (0, 1))
    timestep = jnp.asarray(np.asarray(plan.schedule.timesteps, np.float64))[inputs.step]
    masked = jnp.where(inputs.valid, 1.0, 0.0)

    def transition(trained: Any) -> tuple[jax.Array, jax.Array]:
        network = trained, inputs.base, inputs.negative, inputs.condition
        v = velocity(*network, inputs.latents, timestep)
        return shadow_formulas.transition(
            rollout.sde, v, inputs.latents, sigma, sigma_next, rollout.eta, rollout.clamp
        )

    def log_ratio_to(mean_old: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        sample = mean_old + std * inputs.noise
        return shadow_formulas.log_prob(config.loss, sample, mean, std) - shadow_formulas.log_prob(
            config.loss, sample, mean_old, std
        )

    def loss(trained: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        mean, std = transition(trained)
        # The first update of a rollout is taken to the policy itself, see `ratio`.
        log_ratio = log_ratio_to(jax.lax.stop_gradient(mean), mean, std)
        gain = shadow_formulas.policy_loss(config.loss, log_ratio, inputs.advantages)
        penalty = _penalty(config, mean, std, log_ratio, inputs, transition)
        total = gain * inputs.weights + inputs.kl_weight * penalty
        size = jnp.abs(inputs.advantages) * inputs.weights + inputs.kl_weight * jnp.abs(penalty)

        of_rollout = log_ratio_to(inputs.next_latents - std * inputs.noise, mean, std)
        shown = jnp.where(inputs.valid, of_rollout, 0.0), jnp.sum(masked * size)
        return jnp.sum(masked * total) / inputs.normalizer, shown

    (total, (log_ratio, size)), gradient = jax.value_and_grad(loss, has_aux=True)(inputs.trained)
    return Sides(log_ratio, total, gradient), size / inputs.normalizer


def _penalty(
    config: schema.Config,
    mean: jax.Array,
    std: jax.Array,
    log_ratio: jax.Array,
    inputs: _Inputs,
    transition: Callable[[Any], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Σ beta·KL [m] of the references, or of Eq. 15 for the previous policy."""
    region, total = config.trust_region, jnp.zeros_like(log_ratio)
    betas = [region.anchor_weight] * region.has_anchor
    betas += [region.previous_weight] * region.has_previous
    for beta, reference in zip(betas, inputs.references, strict=True):
        reference_mean = jax.lax.stop_gradient(transition(reference)[0])
        # KL of two Gaussians with one std
        distance = (mean - reference_mean) ** 2 / (2 * std**2)
        total += beta * inputs.kl_weights * shadow_formulas.reduced(config.loss, distance)
    # Eq. 15: log π_old - log π over the samples of π_old.
    if region.penalises_motion and not region.has_previous:
        total -= region.previous_weight * log_ratio
    return total
