"""The update: gradient of the GRPO loss over micro-batches, guarded, then the optimizer.

Functions of arrays, to be jitted by `training/programs.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sage_grpo_jax.flow import guidance, noise, schedules, sde
from sage_grpo_jax.grpo import kl, loss, trust_region
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.training import conditions
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training.recipe import Recipe


class UpdateBatch(NamedTuple):
    """One rollout as the update sees it; B samples, T steps."""

    latents: jax.Array  # float32 [T+1, B, t, h, w, C]: the trajectory
    keys: jax.Array  # typed keys [B]: the noise is drawn again from them
    condition: hunyuan_video.Condition  # leaves [B, ...]
    advantages: jax.Array  # float32 [B]
    valid: jax.Array  # bool [B]: the reward arrived
    starts: jax.Array  # int32 [B]: where the window of trained steps starts


class MicroBatch(NamedTuple):
    """The part of an `UpdateBatch` that goes through the model at once: m samples, a step each."""

    step: jax.Array  # int32 [], or [m] where samples are at different steps
    latents: jax.Array  # x_t [m, ...]
    next_latents: jax.Array  # x_{t+1} [m, ...]
    keys: jax.Array  # [m]
    condition: hunyuan_video.Condition
    advantages: jax.Array  # [m]
    valid: jax.Array  # [m]


class MicroResult(NamedTuple):
    """What a micro-batch gives besides its loss."""

    metrics: dict[str, jax.Array]  # to be added up, see `loss.accumulate_metrics`
    mismatch: ratio_lib.Mismatch  # to be added up with `jnp.maximum`
    mean_old: jax.Array  # [m, ...]


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


def _micro_batch(
    recipe: Recipe, batch: UpdateBatch, position: jax.Array, piece: jax.Array
) -> MicroBatch:
    """A piece of the samples at the `position`-th of their trained steps."""
    size = recipe.config.loss.micro_batch

    def take(x):
        return split_batch(x, size)[piece]

    valid = take(batch.valid)
    steps = jnp.asarray(np.flatnonzero(recipe.trained), jnp.int32)
    random = recipe.window_places > 1
    step = steps[take(batch.starts) + position] if random else steps[position]

    def at(x, step):
        """x[step] of the piece, for one step or one of each sample."""
        if not random:
            return take(x[step])
        pieces = split_batch(jnp.moveaxis(x, 0, 1), size)[piece]  # [m, T + 1, ...]
        return jax.vmap(lambda states, t: states[t])(pieces, step)

    def clean(x):
        # The latents of a masked sample may be NaN, and 0 · NaN in the backward pass is NaN.
        return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)

    return MicroBatch(
        step=step,
        latents=clean(at(batch.latents, step)),
        next_latents=clean(at(batch.latents, step + 1)),
        keys=take(batch.keys),
        condition=jax.tree.map(take, batch.condition),
        advantages=take(batch.advantages),
        valid=valid,
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


def _micro_loss(
    params,
    micro: MicroBatch,
    frozen,
    references,
    kl_weight,
    normalizer,
    recipe,
    recorded=None,
    known=None,
):
    """Policy loss and KL of one micro-batch, both divided by the fixed `normalizer`.

    `recorded` and `known`: see `ratio.old_mean`. Returns (loss, MicroResult).
    """
    new = _transition(recipe, params, micro, frozen)
    draw = noise.step_noise(micro.keys, micro.step, recipe.latent_shape)
    mean_old = ratio_lib.old_mean(new.mean, recorded, known)
    log_ratio = ratio_lib.log_ratio(recipe, draw, new.mean, mean_old, new.std)
    mismatch = ratio_lib.mismatch(
        recipe, micro.step, micro.valid, draw, mean_old, micro.next_latents, new.std
    )
    config = recipe.config.loss
    weights = jnp.asarray(recipe.weights)[micro.step]
    policy_loss, metrics = loss.policy_loss(
        log_ratio[:, None],
        micro.advantages,
        weights.reshape(-1, 1) * _step_factor(recipe),
        config.clip_range,
        mask=micro.valid[:, None],
        objective=config.objective,
        normalizer=normalizer,
    )
    penalty = jnp.zeros(())
    for name, divergence, beta in _divergences(recipe, new, log_ratio, references, micro, frozen):
        divergence = jnp.sum(jnp.where(micro.valid, divergence, 0.0)) / normalizer
        metrics[f"kl/{name}"] = divergence
        penalty += beta * divergence
    total = policy_loss + kl_weight * penalty
    metrics |= {"loss/policy": policy_loss, "loss/total": total, "kl/total": penalty}
    return total, jax.lax.stop_gradient(MicroResult(metrics, mismatch, mean_old))


def _step_factor(recipe: Recipe) -> float:
    """What turns the mean over the trained steps into what the recipe asks for."""
    return float(recipe.positions) if recipe.config.loss.step_reduction == "sum" else 1.0


def _divergences(recipe, new: sde.Transition, log_ratio, references, micro: MicroBatch, frozen):
    """(name, divergence [m], beta) for every term of the KL penalty."""
    region, reduction = recipe.config.trust_region, recipe.config.loss.log_prob_reduction
    for name, reference, beta in references:
        mean = jax.lax.stop_gradient(_transition(recipe, reference, micro, frozen).mean)
        divergence = kl.gaussian_kl(new.mean, mean, new.std, reduction=reduction)
        yield name, divergence * jnp.asarray(recipe.kl_weights)[micro.step], beta
    if region.penalises_motion and not region.has_previous:
        # Eq. 15: the mean of log π_old - log π over the samples of π_old.
        yield "previous", -log_ratio, region.previous_weight


def _gradients(
    recipe: Recipe,
    state: state_lib.LearnerState,
    batch: UpdateBatch,
    frozen: Frozen,
    old: ratio_lib.OldMeans | None,
):
    """Gradient of the whole rollout, accumulated over (step, sample) micro-batches.

    Returns (gradient, metrics, weight of the KL, the old means for the next update or None).
    """
    config = recipe.config
    region = trust_region.find_state(state.opt_state)
    references = trust_region.references(region, config.trust_region)
    pieces = config.batch_size // config.loss.micro_batch
    normalizer = jnp.maximum(jnp.sum(batch.valid) * recipe.positions, 1).astype(jnp.float32)

    def loss_fn(params, micro, recorded):
        known = None if old is None else old.known
        fixed = (frozen, references, region.weight, normalizer, recipe, recorded, known)
        return _micro_loss(params, micro, *fixed)

    def body(totals, inputs):
        (position, piece), recorded = inputs
        micro = _micro_batch(recipe, batch, position, piece)
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (_, result), grads = gradient(state.params, micro, recorded)
        totals = (
            jax.tree.map(jnp.add, totals[0], grads),
            loss.accumulate_metrics(totals[1], result.metrics),
            jax.tree.map(jnp.maximum, totals[2], result.mismatch),
        )
        return totals, None if old is None else result.mean_old

    index = jnp.asarray(np.indices((recipe.positions, pieces)).reshape(2, -1), jnp.int32)
    inputs = (tuple(index), None if old is None else old.means)
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes = jax.eval_shape(
        lambda params: loss_fn(params, _micro_batch(recipe, batch, *first[0]), first[1])[1].metrics,
        state.params,
    )
    init = (
        jax.tree.map(jnp.zeros_like, state.params),
        {k: jnp.full(s.shape, 0.0, s.dtype) for k, s in shapes.items()},
        ratio_lib.no_mismatch(recipe),
    )
    (grads, metrics, mismatch), means = jax.lax.scan(body, init, inputs)
    metrics |= ratio_lib.mismatch_metrics(mismatch)
    recorded = None if old is None else ratio_lib.OldMeans(means, jnp.ones((), bool))
    return grads, metrics, region.weight, recorded


def all_finite(tree: Any) -> jax.Array:
    """True when no leaf holds NaN or infinity; bool []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def make_update(recipe: Recipe, tx: optax.GradientTransformationExtraArgs):
    """(state, batch, frozen, tolerances, old) -> (state, metrics, old).

    The update is applied only if loss, gradient and new parameters are finite, and the first one of
    a rollout only if it starts at ratio 1 and the rollout was that of its parameters (`tolerances`,
    see `ratio.Tolerances`); otherwise the state comes back unchanged (`update/applied` 0).

    `old` is `ratio.OldMeans`, not known yet for the first update of a rollout and handed from one
    to the next, or None with one update a rollout.
    """

    def update(state, batch, frozen, tolerances, old):
        grads, metrics, kl_weight, recorded = _gradients(recipe, state, batch, frozen, old)
        # Targets and bounds of the trust region are KLs per element, whatever is in the loss.
        per_element = {
            name: metrics[f"kl/{name}"] / recipe.summed_elements
            for name in ("total", "previous")
            if f"kl/{name}" in metrics
        }
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            kl=per_element["total"],
            kl_previous=per_element.get("previous"),
        )
        new = state_lib.LearnerState(
            optax.apply_updates(state.params, updates), opt_state, state.step
        )
        checks = {
            "update/finite_loss": jnp.isfinite(metrics["loss/total"]),
            "update/finite_gradient": all_finite(grads),
            "update/finite_params": all_finite(new.params),
            "update/ratio_in_tolerance": (metrics["ratio/max_deviation"] <= tolerances.ratio)
            & (metrics["ratio/rollout_shift"] <= tolerances.shift),
        }
        if old is not None:  # the later updates of a rollout are meant to move the ratio
            checks["update/ratio_in_tolerance"] |= old.known
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
        return state, metrics, recorded

    return update
