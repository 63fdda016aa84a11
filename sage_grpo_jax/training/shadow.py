"""`debug.shadow`: one micro-batch a step, recomputed in float64 on the CPU.

What the update computes (log-ratio, loss, gradient of one micro-batch) is compared with a second
computation that shares as little with it as it can:

  * the velocity is the same network, but every float32 or bfloat16 intermediate, also those that
    the layers ask for by name, is float64: the traced program is evaluated with wider types
    (`float64.in_float64`), so that no layer has to know about it;
  * everything behind the velocity (transition, log-ratio, policy loss, KL) is written a second time
    from the textbook: differences of log-probabilities, `exp`, variances as printed. What `flow/`
    and `grpo/` rewrite for the sake of float32 is not needed here.

Constants (schedule, weights, eta, the noise that was drawn) are the float32 numbers of the run: the
deviation is that of the arithmetic, not of the inputs. The float32 side is the loss function of the
update program, compiled by itself. Meant for small runs: parameters and references go to the host.
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

from sage_grpo_jax.flow import noise, sde
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import float64, micro_losses
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.recipe import Recipe


class Sides(NamedTuple):
    """What both computations of a micro-batch give."""

    log_ratio: Any  # [m], of the policy to the rollout
    loss: Any  # []
    gradient: Any  # tree of the trained parameters


class Shadow:
    """Recomputes a micro-batch and reports the deviation of the update's arithmetic."""

    def __init__(self, recipe: Recipe) -> None:
        """
        Raises:
          ValueError: more than one process, or no CPU backend next to the accelerator.
        """
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
        self._recipe = recipe
        self._mesh = mesh_lib.make_mesh(1, 1, 1, devices=[device])
        self._float32 = jax.jit(functools.partial(_float32_side, recipe))
        self._float64: Callable | None = None

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
        recipe = self._recipe
        pieces = recipe.config.batch_size // recipe.config.loss.micro_batch
        turn = int(state.step) % (recipe.positions * pieces)
        place = np.int32(turn // pieces), np.int32(turn % pieces)
        found, inputs = jax.device_get(self._float32(state, batch, frozen, *place))
        with jax.set_mesh(self._mesh):
            exact, scale = self._exact(inputs)
        return deviations(found, exact, scale)

    def _exact(self, inputs: _Inputs) -> tuple[Sides, float]:
        if self._float64 is None:
            # Traced with the float32 inputs: the program of the network as the update has it.
            recipe, micro = self._recipe, inputs.micro
            timestep = np.zeros(micro.latents.shape[0], np.float32)
            network = inputs.trained, inputs.base, inputs.negative, micro.condition
            program = _velocity_program(recipe)
            velocity = float64.in_float64(program, *network, micro.latents, timestep)
            self._float64 = jax.jit(lambda values: _float64_side(recipe, velocity, values))
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
    """Everything that the float64 side needs, as the run has it; on the host."""

    trained: Any
    base: Any  # with LoRA the frozen weights, else None
    negative: hunyuan_video.Condition
    micro: micro_losses.MicroBatch  # keys dropped
    noise: jax.Array  # [m, ...], as drawn in the rollout
    references: tuple[Any, ...]  # parameters
    kl_weight: jax.Array
    normalizer: jax.Array


def _float32_side(recipe: Recipe, state, batch, frozen, position, piece) -> tuple[Sides, _Inputs]:
    """The update's own loss, gradient and log-ratio at one micro-batch, and its inputs."""
    given = update_lib.loss_inputs(recipe, state, frozen, jnp.sum(batch.valid))
    micro = update_lib.take_micro_batch(recipe, batch, position, piece)

    loss = functools.partial(micro_losses.policy_micro_loss, recipe=recipe)
    (total, _), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, micro, given)
    draw = noise.step_noise(micro.keys, micro.step, recipe.latent_shape)
    new = micro_losses.transition(recipe, state.params, micro, frozen)
    log_ratio = ratio_lib.rollout_log_ratio(recipe, draw, new.mean, micro.next_latents, new.std)
    log_ratio = jnp.where(micro.valid, log_ratio, 0.0)
    inputs = _Inputs(
        trained=state.params,
        base=frozen.base,
        negative=frozen.negative,
        micro=micro._replace(keys=None),
        noise=draw,
        references=tuple(reference.params for reference in given.references),
        kl_weight=given.kl_weight,
        normalizer=given.normalizer,
    )
    return Sides(log_ratio, total, gradient), inputs


def _velocity_program(recipe: Recipe) -> Callable:
    """(trained, base, negative, condition, latents, timestep) -> velocity, as the update has it.

    With plain attention and nothing recomputed: what changes is how it runs.
    """
    transformer = dataclasses.replace(recipe.transformer, attention="xla", remat=False)
    recipe = dataclasses.replace(recipe, transformer=transformer)

    def velocity(trained, base, negative, condition, latents, timestep):
        frozen = micro_losses.Frozen(negative, base)
        gradient = recipe.config.loss.guidance_gradient
        policy = micro_losses.velocity_fn(recipe, trained, condition, frozen, gradient=gradient)
        return policy(latents, timestep)

    return velocity


def _float64_side(recipe: Recipe, velocity: Callable, inputs: _Inputs) -> tuple[Sides, jax.Array]:
    """The same quantities from the textbook, and the scale that the loss is judged by."""
    config, micro = recipe.config, inputs.micro
    shape = (-1,) + (1,) * (micro.latents.ndim - 1)
    count = micro.latents.shape[0]
    step = jnp.broadcast_to(micro.step, (count,))
    sigmas = np.asarray(recipe.schedule.sigmas, np.float64)
    sigma, sigma_next = (jnp.asarray(sigmas)[step + i].reshape(shape) for i in (0, 1))
    timestep = jnp.asarray(np.asarray(recipe.schedule.timesteps, np.float64))[step]
    weights = jnp.asarray(np.asarray(recipe.weights, np.float64))[step]
    weights = weights * (recipe.positions if config.loss.step_reduction == "sum" else 1)
    masked = jnp.where(micro.valid, 1.0, 0.0)

    def transition(trained):
        v = velocity(
            trained, inputs.base, inputs.negative, micro.condition, micro.latents, timestep
        )
        kind, eta, clamp = config.rollout.sde, config.rollout.eta, config.rollout.clamp
        return plain_transition(kind, v, micro.latents, sigma, sigma_next, eta, clamp)

    def log_ratio_to(mean_old, mean, std):
        sample = mean_old + std * inputs.noise
        return plain_log_prob(config.loss, sample, mean, std) - plain_log_prob(
            config.loss, sample, mean_old, std
        )

    def loss(trained):
        mean, std = transition(trained)
        # The first update of a rollout is taken to the policy itself, see `ratio`.
        log_ratio = log_ratio_to(jax.lax.stop_gradient(mean), mean, std)
        per_sample = plain_policy_loss(config.loss, log_ratio, micro.advantages) * weights
        penalty = _plain_penalty(recipe, mean, std, log_ratio, inputs, transition)
        total = jnp.sum(masked * (per_sample + inputs.kl_weight * penalty)) / inputs.normalizer
        size = jnp.abs(micro.advantages) * weights + inputs.kl_weight * jnp.abs(penalty)
        of_rollout = log_ratio_to(micro.next_latents - std * inputs.noise, mean, std)
        return total, (jnp.where(micro.valid, of_rollout, 0.0), jnp.sum(masked * size))

    (total, (log_ratio, size)), gradient = jax.value_and_grad(loss, has_aux=True)(inputs.trained)
    return Sides(log_ratio, total, gradient), size / inputs.normalizer


def plain_transition(
    kind: str,
    velocity: Any,
    sample: Any,
    sigma: Any,
    sigma_next: Any,
    eta: float,
    clamp: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(mean, std) of a step as the papers print it; float64, see `flow.sde.transition`."""
    dt = sigma_next - sigma
    clean, predicted_noise = sample - sigma * velocity, sample + (1 - sigma) * velocity
    if kind == "cps":
        angle = eta * math.pi / 2
        turned = sigma_next * (math.cos(angle) * predicted_noise)
        return (1 - sigma_next) * clean + turned, sigma_next * math.sin(angle)
    if kind == "precise":
        lowest = float(np.float32(clamp or sde.CLAMP))
        start = jnp.maximum(1 - sigma, lowest)
        end = jnp.maximum(1 - sigma_next, lowest)
        variance = eta**2 * (jnp.log(end / start) - (end - start))
    elif kind == "flow":
        # At σ = 1 its diffusion coefficient is infinite; Flow-GRPO takes the next σ there.
        distance = jnp.where(sigma >= 1, 1 - sigma_next, 1 - sigma)
        distance = jnp.maximum(1 - sigma, clamp) if clamp else distance
        variance = eta**2 * sigma / distance * -dt
    else:
        variance = eta**2 * -dt
    score = -predicted_noise / sigma
    return sample + dt * velocity + variance * score / 2, jnp.sqrt(variance)


def plain_log_prob(loss: Any, sample: Any, mean: Any, std: Any) -> jax.Array:
    """Log-probability [m] up to constants that do not depend on the mean; float64."""
    squares = -((sample - mean) ** 2)
    density = squares if loss.log_prob == "squared" else squares / (2 * std**2)
    axes = tuple(range(1, density.ndim))
    return density.sum(axes) if loss.log_prob_reduction == "sum" else density.mean(axes)


def plain_policy_loss(loss: Any, log_ratio: Any, advantages: Any) -> jax.Array:
    """The loss [m] of every sample, before the time weight; float64."""
    if loss.objective == "reinforce":
        return -advantages * log_ratio
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - loss.clip_range, 1 + loss.clip_range)
    return -jnp.minimum(advantages * ratio, advantages * clipped)


def _plain_penalty(recipe: Recipe, mean, std, log_ratio, inputs: _Inputs, transition) -> jax.Array:
    """Σ beta·KL [m] of the references, or of Eq. 15 for the previous policy."""
    region, total = recipe.config.trust_region, jnp.zeros_like(log_ratio)
    count = inputs.micro.latents.shape[0]
    time_weights = jnp.asarray(np.asarray(recipe.kl_weights, np.float64))[
        jnp.broadcast_to(inputs.micro.step, (count,))
    ]
    axes = tuple(range(1, mean.ndim))
    betas = [region.anchor_weight] * region.has_anchor
    betas += [region.previous_weight] * region.has_previous
    for beta, reference in zip(betas, inputs.references, strict=True):
        reference_mean = jax.lax.stop_gradient(transition(reference)[0])
        divergence = (mean - reference_mean) ** 2 / (2 * std**2)
        summed = recipe.config.loss.log_prob_reduction == "sum"
        divergence = divergence.sum(axes) if summed else divergence.mean(axes)
        total += beta * time_weights * divergence
    if region.penalises_motion and not region.has_previous:
        total -= region.previous_weight * log_ratio
    return total
