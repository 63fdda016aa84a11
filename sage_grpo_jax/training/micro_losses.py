"""The losses of one micro-batch: some samples, each at one denoising step.

`policy_micro_loss` is that of the policies that inject noise (PPO or REINFORCE on the transition),
`forward_micro_loss` that of DiffusionNFT. Both are shares of a mean over all entries of an update:
added up over the micro-batches they are the loss.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sage_grpo_jax.config.plan import Plan
from sage_grpo_jax.flow import noise, sde
from sage_grpo_jax.grpo import kl, loss, nft, trust_region
from sage_grpo_jax.policy import policy as policy_lib
from sage_grpo_jax.training import ratio as ratio_lib


class MicroBatch(NamedTuple):
    """The part of an `UpdateBatch` that goes through the model at once: m samples, a step each."""

    step: jax.Array  # int32 [], or [m] where samples are at different steps
    latents: jax.Array  # x_t [m, ...]; for the forward process the clean x_T
    next_latents: jax.Array  # x_{t+1} [m, ...]; for the forward process x_T
    keys: jax.Array  # [m]
    condition: Any  # of the m samples, as the model makes it
    advantages: jax.Array  # [m]
    valid: jax.Array  # bool [m]
    counts: jax.Array  # bool [m]: valid, and trained in this update


class MicroResult(NamedTuple):
    """What a micro-batch gives besides its loss."""

    metrics: dict[str, jax.Array]  # to be added up, see `loss.accumulate_metrics`
    # Both None for the forward process, which has no ratio.
    mismatch: ratio_lib.Mismatch | None  # to be added up with `jnp.maximum`
    mean_old: jax.Array | None  # [m, ...]


class Frozen(NamedTuple):
    """What the policy needs besides the trained parameters."""

    negative: Any  # condition of the one unconditional prompt, leaves [1, ...]
    base: Any = None  # the weights under the adapters; None: all weights are trained


class LossInputs(NamedTuple):
    """What the loss of a micro-batch needs besides parameters and samples."""

    frozen: Frozen
    references: list[trust_region.Reference]
    kl_weight: jax.Array  # f32 []
    normalizer: jax.Array  # f32 []: (sample, step) entries of the update
    sampling: Any = None  # parameters that made the samples; for the forward process only


def policy_of(plan: Plan, trained: Any, frozen: Frozen) -> policy_lib.Policy:
    """The policy of trained parameters: all of them, or adapters over the frozen base."""
    if frozen.base is None:
        return policy_lib.Policy(trained)
    return policy_lib.Policy(frozen.base, trained, plan.config.lora.adapters.scale)


def guidance_of(plan: Plan) -> policy_lib.Guidance:
    """Guidance and numerics of a recipe."""
    rollout = plan.config.rollout
    return policy_lib.Guidance(
        rollout.guidance, rollout.guidance_mode, plan.config.model.matmul_precision
    )


def velocity_fn(plan: Plan, trained: Any, condition: Any, frozen: Frozen) -> policy_lib.Velocity:
    """(latents, timestep) -> velocity of the policy, as the loss differentiates it.

    Args:
      plan: the constants.
      trained: all parameters, or the adapters where `frozen` holds their base.
      condition: of B samples.
      frozen: negative prompt and base.
    """
    return policy_lib.guided_velocity(
        policy_of(plan, trained, frozen),
        plan.transformer,
        condition,
        frozen.negative,
        plan.schedule,
        guidance_of(plan),
        plan.config.loss.guidance_gradient,
    )


def _velocity(
    plan: Plan, params: Any, micro: MicroBatch, frozen: Frozen, latents: jax.Array
) -> jax.Array:
    """The velocity of the policy `params` at states of a micro-batch; float32 [m, ...]."""
    velocity = velocity_fn(plan, params, micro.condition, frozen)
    # [] or [m] -> [m]
    timestep = jnp.asarray(plan.schedule.timesteps)[micro.step]
    return velocity(latents, jnp.broadcast_to(timestep, micro.valid.shape))


def transition(plan: Plan, params: Any, micro: MicroBatch, frozen: Frozen) -> sde.Transition:
    """The transition of the policy `params` at the states of a micro-batch."""
    config, sigmas = plan.config.rollout, jnp.asarray(plan.schedule.sigmas)
    return sde.transition(
        config.sde,
        _velocity(plan, params, micro, frozen, micro.latents),
        micro.latents,
        sigmas[micro.step],
        sigmas[micro.step + 1],
        config.eta,
        clamp=config.clamp,
    )


# Name, value [m] and weight of one term of the penalty.
Divergence = tuple[str, jax.Array, float]


def policy_micro_loss(
    params: Any,
    micro: MicroBatch,
    inputs: LossInputs,
    plan: Plan,
    recorded: jax.Array | None = None,
    known: jax.Array | None = None,
) -> tuple[jax.Array, MicroResult]:
    """Policy loss and KL of one micro-batch, both divided by the fixed `normalizer`.

    Args:
      params: what is differentiated: all parameters, or the adapters.
      micro: m samples, a step each.
      inputs: references, weight of the KL and normaliser.
      plan: the constants.
      recorded, known: see `ratio.old_mean`.

    Returns:
      The loss, f32 [], and what else is to be known.
    """
    # The ratio to the policy that sampled
    new = transition(plan, params, micro, inputs.frozen)
    # ε is drawn again from the keys, bit for bit that of the rollout. In the first pass the means
    # are equal: the ratio is 1, and what is left of the gradient is ε·∂δ.
    draw = noise.step_noise(micro.keys, micro.step, plan.latent_shape)
    mean_old = ratio_lib.old_mean(new.mean, recorded, known)
    log_ratio = ratio_lib.log_ratio(plan, draw, new.mean, mean_old, new.std)
    mismatch = ratio_lib.mismatch(
        plan, micro.step, micro.valid, draw, mean_old, micro.next_latents, new.std
    )

    # The policy loss
    config = plan.config.loss
    # S_t of each sample: [1, 1] where all are at one step, [m, 1] where each has its own. An entry
    # of the loss is a (sample, step), here one step a sample.
    weights = jnp.asarray(plan.weights)[micro.step]
    policy_loss, metrics = loss.policy_loss(
        log_ratio[:, None],
        micro.advantages,
        weights.reshape(-1, 1) * _step_factor(plan),
        config.clip_range,
        mask=micro.counts[:, None],
        objective=config.objective,
        normalizer=inputs.normalizer,
    )

    # The penalty
    divergences = _divergences(plan, new, log_ratio, micro, inputs)
    total, metrics = _with_penalty(policy_loss, metrics, divergences, micro, inputs)
    return total, jax.lax.stop_gradient(MicroResult(metrics, mismatch, mean_old))


def forward_micro_loss(
    params: Any,
    micro: MicroBatch,
    inputs: LossInputs,
    plan: Plan,
    recorded: jax.Array | None = None,
    known: jax.Array | None = None,
) -> tuple[jax.Array, MicroResult]:
    """`policy_micro_loss` of DiffusionNFT: clean samples, noised again; see `grpo.nft`."""
    del recorded, known  # there is no ratio
    config = plan.config

    # States of the forward process, and every policy's velocity there
    draw = noise.forward_noise(micro.keys, micro.step, plan.latent_shape)
    sigma = jnp.asarray(plan.schedule.sigmas)[micro.step]
    latents, target = nft.noised(micro.latents, draw, sigma)
    # The trained policy, the one that sampled and the references see the same noised states.
    new, *others = (
        _velocity(plan, trained, micro, inputs.frozen, latents)
        for trained in (params, inputs.sampling, *(r.params for r in inputs.references))
    )
    old, *references = map(jax.lax.stop_gradient, others)

    # The policy loss. The mask comes before any arithmetic: what stands behind it must not reach
    # the gradient.
    advantages = jnp.where(micro.counts, micro.advantages, 0.0)
    good = nft.optimality(advantages, config.advantage.clip)
    losses = nft.nft_loss(
        new, old, target, sigma, good, config.nft.beta, adaptive=config.nft.adaptive
    )
    # Its authors multiply the loss by the largest advantage: r holds A divided by it.
    losses *= config.advantage.clip * _step_factor(plan)
    policy_loss = _sum(losses, micro, inputs)

    # The penalty
    divergences = [
        (reference.name, nft.velocity_distance(new, velocity), reference.beta)
        for reference, velocity in zip(inputs.references, references, strict=True)
    ]
    metrics = {"nft/sampling_distance": _sum(nft.velocity_distance(new, old), micro, inputs)}
    total, metrics = _with_penalty(policy_loss, metrics, divergences, micro, inputs)
    return total, jax.lax.stop_gradient(MicroResult(metrics, None, None))


def _sum(values: jax.Array, micro: MicroBatch, inputs: LossInputs) -> jax.Array:
    """The share [] of a micro-batch in the mean over all entries."""
    # A masked entry may hold NaN: it is selected out, not multiplied by 0.
    return jnp.sum(jnp.where(micro.counts, values, 0.0)) / inputs.normalizer


def _with_penalty(
    policy_loss: jax.Array,
    metrics: loss.Metrics,
    divergences: Iterable[Divergence],
    micro: MicroBatch,
    inputs: LossInputs,
) -> tuple[jax.Array, loss.Metrics]:
    """(policy loss plus weighted penalty, metrics of both)."""
    penalty = jnp.zeros(())
    for name, divergence, beta in divergences:
        divergence = _sum(divergence, micro, inputs)
        metrics[f"kl/{name}"] = divergence
        penalty += beta * divergence
    total = policy_loss + inputs.kl_weight * penalty
    return total, metrics | {
        "loss/policy": policy_loss,
        "loss/total": total,
        "kl/total": penalty,
    }


def _step_factor(plan: Plan) -> float:
    """What turns the mean over the trained steps into what the recipe asks for."""
    return float(plan.positions) if plan.config.loss.step_reduction == "sum" else 1.0


def _divergences(
    plan: Plan,
    new: sde.Transition,
    log_ratio: jax.Array,
    micro: MicroBatch,
    inputs: LossInputs,
) -> Iterator[Divergence]:
    """Every term of the KL penalty."""
    region, reduction = plan.config.trust_region, plan.config.loss.log_prob_reduction
    for name, reference, beta in inputs.references:
        # This is one more forward pass at the same states. Kind and η are the same, and so is the
        # std.
        mean = jax.lax.stop_gradient(transition(plan, reference, micro, inputs.frozen).mean)
        divergence = kl.gaussian_kl(new.mean, mean, new.std, reduction=reduction)
        yield name, divergence * jnp.asarray(plan.kl_weights)[micro.step], beta
    if region.penalises_motion and not region.has_previous:
        # Eq. 15: the mean of log π_old - log π over the samples of π_old.
        yield "previous", -log_ratio, region.previous_weight
