"""The update: gradient of the GRPO loss over micro-batches, guarded, then the optimizer.

Functions of arrays, to be jitted by `training/programs.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sage_grpo_jax.flow import guidance, noise, schedules, sde
from sage_grpo_jax.flow import rollout as rollout_lib
from sage_grpo_jax.grpo import kl, loss, trust_region
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.training import conditions
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training.recipe import Recipe


class UpdateBatch(NamedTuple):
    """One rollout as the update sees it; B samples, T steps."""

    latents: jax.Array  # float32 [T+1, B, t, h, w, C]: the trajectory
    keys: jax.Array  # typed keys [B]: the noise is drawn again from them
    condition: hunyuan_video.Condition  # leaves [B, ...]
    advantages: jax.Array  # float32 [B]
    valid: jax.Array  # bool [B]: the reward arrived
    mean_old: jax.Array | None = None  # [T, B, ...]: replayed transition means; None: from noise


class MicroBatch(NamedTuple):
    """The part of an `UpdateBatch` that goes through the model at once: m samples at one step."""

    step: jax.Array  # int32 []
    latents: jax.Array  # x_t [m, ...]
    next_latents: jax.Array  # x_{t+1} [m, ...]
    keys: jax.Array  # [m]
    condition: hunyuan_video.Condition
    advantages: jax.Array  # [m]
    valid: jax.Array  # [m]
    mean_old: jax.Array | None  # [m, ...]


class Frozen(NamedTuple):
    """What the policy needs besides the trained parameters."""

    negative: hunyuan_video.Condition  # the one unconditional prompt, leaves [1, ...]
    base: Any = None  # the weights under the adapters; None: all weights are trained


def velocity_fn(
    recipe: Recipe,
    trained: Any,
    condition: hunyuan_video.Condition,
    frozen: Frozen,
    schedule: schedules.Schedule | None = None,
):
    """(latents, timestep) -> velocity of the policy, with guidance.

    Args:
      recipe: the constants.
      trained: all parameters, or the adapters where `frozen` holds their base.
      condition: of B samples.
      frozen: negative prompt and base.
      schedule: of the sampler; None for that of the rollout. Only a model that knows where its step
        ends (use_meanflow) looks at it.
    """
    schedule = recipe.schedule if schedule is None else schedule
    negative = conditions.unconditional(condition, frozen.negative)
    params, adapters, scale = trained, None, 1.0
    if frozen.base is not None:
        params, adapters, scale = frozen.base, trained, recipe.config.lora.adapters.scale

    def model(latents, timestep, branch):
        if recipe.transformer.use_meanflow:
            branch = branch._replace(timestep_r=schedules.next_timestep(schedule, timestep))
        with jax.default_matmul_precision(recipe.config.model.matmul_precision):
            return hunyuan_video.velocity(
                params, latents, timestep, branch, recipe.transformer, adapters, scale
            )

    rollout = recipe.config.rollout
    guided = guidance.guided(model, rollout.guidance, mode=rollout.guidance_mode)
    return lambda latents, timestep: guided(latents, timestep, condition, negative)


def split_batch(tree: Any, size: int) -> Any:
    """[B, ...] -> [B/size, size, ...], each piece taking its share of every device.

    Sample b lands in piece b % (B/size) at row b // (B/size): axis 0 stays the one that the mesh
    divides, and no data moves between devices.
    """

    def split(x):
        return jnp.moveaxis(x.reshape(size, x.shape[0] // size, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def _micro_batch(batch: UpdateBatch, size: int, step: jax.Array, piece: jax.Array) -> MicroBatch:
    def take(x):
        return split_batch(x, size)[piece]

    valid = take(batch.valid)

    def take_latents(x):
        # The latents of a masked sample may be NaN, and 0 · NaN in the backward pass is NaN.
        return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 2)), take(x[step]), 0.0)

    return MicroBatch(
        step=step,
        latents=take_latents(batch.latents),
        next_latents=take_latents(batch.latents[1:]),
        keys=take(batch.keys),
        condition=jax.tree.map(take, batch.condition),
        advantages=take(batch.advantages),
        valid=valid,
        mean_old=None if batch.mean_old is None else take_latents(batch.mean_old),
    )


def _transition(recipe: Recipe, params: Any, micro: MicroBatch, frozen: Frozen) -> sde.Transition:
    """The transition of the policy `params` at the states of a micro-batch."""
    config, schedule = recipe.config.rollout, recipe.schedule
    count = micro.latents.shape[0]
    velocity = velocity_fn(recipe, params, micro.condition, frozen)
    timestep = jnp.broadcast_to(jnp.asarray(schedule.timesteps)[micro.step], (count,))
    sigmas = jnp.asarray(schedule.sigmas)
    return sde.transition(
        config.sde,
        velocity(micro.latents, timestep),
        micro.latents,
        sigmas[micro.step],
        sigmas[micro.step + 1],
        config.eta,
    )


def _micro_loss(params, micro: MicroBatch, frozen, references, kl_weight, normalizer, recipe):
    """Policy loss and KL of one micro-batch, both divided by the fixed `normalizer`."""
    new = _transition(recipe, params, micro, frozen)
    if micro.mean_old is None:
        draw = noise.step_noise(micro.keys, micro.step, recipe.latent_shape)
        mean_old = rollout_lib.behaviour_mean(micro.next_latents, draw, new.std)
    else:
        mean_old = micro.mean_old
        draw = (micro.next_latents - mean_old) / new.std
    log_ratio = sde.log_ratio(
        draw, new.mean, mean_old, new.std, log_prob=recipe.config.loss.log_prob
    )
    policy_loss, metrics = loss.policy_loss(
        log_ratio[:, None],
        micro.advantages,
        jnp.asarray(recipe.weights)[micro.step][None],
        recipe.config.loss.clip_range,
        mask=micro.valid[:, None],
        objective=recipe.config.loss.objective,
        normalizer=normalizer,
    )
    penalty = jnp.zeros(())
    for name, reference, beta in references:
        mean = jax.lax.stop_gradient(_transition(recipe, reference, micro, frozen).mean)
        divergence = kl.gaussian_kl(new.mean, mean, new.std)
        divergence = jnp.sum(jnp.where(micro.valid, divergence, 0.0)) / normalizer
        metrics[f"kl/{name}"] = jax.lax.stop_gradient(divergence)
        penalty += beta * divergence
    total = policy_loss + kl_weight * penalty
    metrics |= {"loss/policy": policy_loss, "loss/total": total, "kl/total": penalty}
    return total, jax.lax.stop_gradient(metrics)


def _gradients(recipe: Recipe, state: state_lib.LearnerState, batch: UpdateBatch, frozen):
    """Gradient and metrics of the whole rollout, accumulated over (step, sample) micro-batches."""
    config = recipe.config
    region = trust_region.find_state(state.opt_state)
    references = trust_region.references(region, config.trust_region)
    steps = np.flatnonzero(recipe.trained)
    pieces = config.batch_size // config.loss.micro_batch
    normalizer = jnp.maximum(jnp.sum(batch.valid) * len(steps), 1).astype(jnp.float32)

    def loss_fn(params, micro):
        return _micro_loss(params, micro, frozen, references, region.weight, normalizer, recipe)

    def body(totals, index):
        micro = _micro_batch(batch, config.loss.micro_batch, index[0], index[1])
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, micro)
        grads = jax.tree.map(jnp.add, totals[0], grads)
        return (grads, loss.accumulate_metrics(totals[1], metrics)), None

    index = np.stack(np.meshgrid(steps, np.arange(pieces), indexing="ij"), -1).reshape(-1, 2)
    micro = jax.eval_shape(lambda: _micro_batch(batch, config.loss.micro_batch, 0, 0))
    shapes = jax.eval_shape(lambda m: loss_fn(state.params, m)[1], micro)
    init = (
        jax.tree.map(jnp.zeros_like, state.params),
        {k: jnp.full(s.shape, 0.0, s.dtype) for k, s in shapes.items()},
    )
    (grads, metrics), _ = jax.lax.scan(body, init, jnp.asarray(index, jnp.int32))
    return grads, metrics, region.weight


def all_finite(tree: Any) -> jax.Array:
    """True when no leaf holds NaN or infinity; bool []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def make_update(recipe: Recipe, tx: optax.GradientTransformationExtraArgs):
    """(state, batch, frozen, tolerance) -> (state, metrics).

    The update is applied only if loss, gradient and new parameters are finite and no ratio is
    further than `tolerance` from 1; otherwise the state comes back unchanged (`update/applied` 0).
    """

    def update(state, batch, frozen, tolerance):
        grads, metrics, kl_weight = _gradients(recipe, state, batch, frozen)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, kl=metrics["kl/total"])
        new = state_lib.LearnerState(
            optax.apply_updates(state.params, updates), opt_state, state.step
        )
        checks = {
            "update/finite_loss": jnp.isfinite(metrics["loss/total"]),
            "update/finite_gradient": all_finite(grads),
            "update/finite_params": all_finite(new.params),
            "update/ratio_in_tolerance": metrics["ratio/max_deviation"] <= tolerance,
        }
        applied = jnp.all(jnp.stack(list(checks.values())))
        state = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state)
        norm = optax.tree.norm(grads)
        count = sum(x.size for x in jax.tree.leaves(grads))
        metrics |= {
            "grad/norm": norm,
            # Adam divides by |g| + eps: below 1 the step is no longer scale-free.
            "grad/rms_over_eps": norm / np.sqrt(count) / recipe.config.optimizer.eps,
            "kl/weight": kl_weight,
            "update/applied": applied,
            **checks,
        }
        return state, metrics

    return update


def make_replay(recipe: Recipe):
    """(params, batch, frozen) -> transition means [T, B, ...] by the update's own forward pass.

    Where low precision makes the update program disagree with the rollout, its means replace those
    of the rollout, so that the ratio starts at 1. Untrained steps stay 0.
    """
    size = recipe.config.loss.micro_batch

    def replay(params, batch, frozen):
        pieces = jnp.arange(recipe.config.batch_size // size)

        def at_step(step):
            def piece_mean(piece):
                micro = _micro_batch(batch, size, step, piece)
                return _transition(recipe, params, micro, frozen).mean

            means = jnp.moveaxis(jax.lax.map(piece_mean, pieces), 0, 1)
            return means.reshape(batch.latents.shape[1:])

        steps = np.flatnonzero(recipe.trained)
        means = jax.lax.map(at_step, jnp.asarray(steps, jnp.int32))
        return jnp.zeros_like(batch.latents[1:]).at[steps].set(means)

    return replay
