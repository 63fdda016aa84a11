"""The update: gradient of the GRPO loss over micro-batches, guarded, then the optimizer.

Functions of arrays, to be jitted by `training/programs.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sage_grpo_jax.config import step_plan
from sage_grpo_jax.config.plan import Plan
from sage_grpo_jax.grpo import averaging, loss, trust_region
from sage_grpo_jax.training import micro_losses
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training.micro_losses import Frozen, LossInputs, MicroBatch, MicroResult

# (position, piece) of a micro-batch, int32 [] each
Index = tuple[jax.Array, jax.Array]
# entry(index, recorded means) -> (gradient, MicroResult) of a micro-batch
Entry = Callable[[Index, jax.Array | None], tuple[Any, MicroResult]]


class UpdateBatch(NamedTuple):
    """One rollout as the update sees it; B samples, T steps."""

    # float32 [T+1, B, N]: the trajectory, each state flat; for the forward process its last state.
    latents: jax.Array
    keys: jax.Array  # typed keys [B]: the noise is drawn again from them
    condition: Any  # leaves [B, ...]
    advantages: jax.Array  # float32 [B]
    valid: jax.Array  # bool [B]: the reward arrived
    starts: jax.Array  # int32 [B]: where the window of trained steps starts


def split_batch(tree: Any, size: int) -> Any:
    """[B, ...] -> [B/size, size, ...], each piece taking its share of every device.

    Sample b lands in piece b % (B/size) at row b // (B/size): axis 0 stays the one that the mesh
    divides, and no data moves between devices.
    """

    def split(x: jax.Array) -> jax.Array:
        # [B, ...] -> [size, n, ...] -> [n, size, ...] with n = B/size. A plain reshape to [n, size]
        # would put the samples of one device into one piece, and the others would wait.
        return jnp.moveaxis(x.reshape(size, x.shape[0] // size, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def take_micro_batch(
    plan: Plan, batch: UpdateBatch, position: jax.Array, piece: jax.Array
) -> MicroBatch:
    """A piece of the samples at the `position`-th of their trained steps."""
    size = plan.config.loss.micro_batch

    def take(x: jax.Array) -> jax.Array:
        return split_batch(x, size)[piece]

    # Which samples, at which steps
    valid, starts, keys = take(batch.valid), take(batch.starts), take(batch.keys)
    step = step_plan.trained_step(plan.steps, position, starts, keys)

    # Their states, flat
    def state(after: jax.Array) -> jax.Array:
        """The states after `after` steps, for one step or one of each sample."""
        if plan.is_forward:
            return take(batch.latents[-1])
        if not plan.steps.varies:
            # All samples are at one step, a slice of [T + 1, B, ...].
            return take(batch.latents[after])
        # Each has a step of its own. The samples come first, so that they are divided as ever.
        pieces = split_batch(jnp.moveaxis(batch.latents, 0, 1), size)[piece]  # [m, T + 1, ...]
        return jax.vmap(lambda states, t: states[t])(pieces, after)

    def clean(x: jax.Array) -> jax.Array:
        # The latents of a masked sample may be NaN, and 0 · NaN in the backward pass is NaN.
        return jnp.where(valid[:, None], x, 0.0).reshape(-1, *plan.latent_shape)

    return MicroBatch(
        step=step,
        latents=clean(state(step)),
        next_latents=clean(state(step + 1)),
        keys=keys,
        condition=jax.tree.map(take, batch.condition),
        advantages=take(batch.advantages),
        valid=valid,
        counts=valid,
    )


def loss_inputs(
    plan: Plan, state: state_lib.LearnerState, frozen: Frozen, count: jax.Array
) -> LossInputs:
    """The inputs of an update over `count` samples."""
    region = trust_region.find_state(state.opt_state)
    # The normaliser counts the entries of the whole update, so that the shares of its micro-batches
    # add up to one mean. Without a valid sample that mean is 0, not NaN.
    return LossInputs(
        frozen=frozen,
        references=trust_region.references(region, plan.config.trust_region),
        kl_weight=region.weight,
        normalizer=jnp.maximum(count * plan.positions, 1).astype(jnp.float32),
        sampling=state.sampled if plan.is_forward else None,
    )


def _share(plan: Plan, piece: Any, turn: Any) -> jax.Array:
    """Whether the samples of a piece belong to update `turn` of a rollout; bool like `piece`.

    With split updates sample b is trained in update b mod U, and so a part of every group is:
    whichever, as the members of a group are drawn alike.
    """
    if not plan.config.loss.split_updates:
        return jnp.full(jnp.shape(piece), True)
    # The samples of piece p are p + n·row, n the number of pieces, which U divides.
    return piece % plan.config.loss.updates_per_rollout == turn


def _where_needed(
    plan: Plan,
    entry: Entry,
    index: Index,
    recorded: jax.Array | None,
    old: ratio_lib.OldMeans | None,
) -> tuple[Any, MicroResult]:
    """`entry(index, recorded)`; nothing of it for the samples that an update has no use for.

    The first update of a rollout goes through all of them: it records the means of those that the
    later updates are trained on, in the same program as theirs.
    """
    if not plan.config.loss.split_updates:
        return entry(index, recorded)

    needed = _share(plan, index[1], old.turn)
    if not plan.is_forward:
        needed |= ~old.known

    def nothing(index: Index, recorded: jax.Array | None) -> tuple[Any, MicroResult]:
        shapes = jax.eval_shape(entry, index, recorded)
        grads, result = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        none = None if plan.is_forward else ratio_lib.no_mismatch(plan)
        # The recorded means are handed on as they are; a maximum starts from -inf, not from 0.
        return grads, result._replace(mismatch=none, mean_old=recorded)

    # This is a branch and not a mask: the passes of the other samples are not run. The index is the
    # same on every device, so that all of them take the same branch.
    return jax.lax.cond(needed, entry, nothing, index, recorded)


def _gradients(
    plan: Plan,
    state: state_lib.LearnerState,
    batch: UpdateBatch,
    frozen: Frozen,
    old: ratio_lib.OldMeans | None,
) -> tuple[Any, loss.Metrics, jax.Array, ratio_lib.OldMeans | None]:
    """Gradient of the samples of an update, accumulated over (step, sample) micro-batches.

    Returns:
      Gradient, metrics, weight of the KL, and the old means for the next update or None.
    """
    # The samples that count
    config = plan.config
    pieces = config.batch_size // config.loss.micro_batch
    turn = None if old is None else old.turn
    valid = split_batch(batch.valid, config.loss.micro_batch)  # [pieces, m]
    mine = valid & _share(plan, jnp.arange(pieces), turn)[:, None]
    inputs = loss_inputs(plan, state, frozen, jnp.sum(mine))

    # One micro-batch
    micro_loss = micro_losses.policy_micro_loss
    if plan.is_forward:
        micro_loss = micro_losses.forward_micro_loss

    def loss_fn(
        params: Any, micro: MicroBatch, recorded: jax.Array | None
    ) -> tuple[jax.Array, MicroResult]:
        known = None if old is None else old.known
        return micro_loss(params, micro, inputs, plan, recorded, known)

    def entry(index: Index, recorded: jax.Array | None) -> tuple[Any, MicroResult]:
        """(gradient, MicroResult) of a micro-batch."""
        micro = take_micro_batch(plan, batch, *index)
        micro = micro._replace(counts=micro.valid & _share(plan, index[1], turn))
        (_, result), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, micro, recorded
        )
        return grads, result

    # The scan over all of them: gradients and metrics are added up. Each gradient is taken inside
    # of the loop, so that no activation outlives its micro-batch.
    def body(
        totals: tuple[Any, ...], scanned: tuple[Index, jax.Array | None]
    ) -> tuple[tuple[Any, ...], jax.Array | None]:
        index, recorded = scanned
        grads, result = _where_needed(plan, entry, index, recorded, old)
        totals = (
            jax.tree.map(jnp.add, totals[0], grads),
            loss.accumulate_metrics(totals[1], result.metrics),
            jax.tree.map(jnp.maximum, totals[2], result.mismatch),
        )
        return totals, None if old is None else result.mean_old

    # The scan goes through every (position, piece), piece by piece at each position, and reads
    # recorded means in the order in which it has stacked them. Both indices are int32
    # [positions·pieces].
    index = jnp.asarray(np.indices((plan.positions, pieces)).reshape(2, -1), jnp.int32)
    scanned = (tuple(index), None if old is None else old.means)
    # A scan wants its totals before it runs anything: the names and types of the metrics come from
    # the shapes of one micro-batch. Gradients are added up in the type of the parameters, float32,
    # whatever the network computes in.
    _, shapes = jax.eval_shape(lambda: entry(*jax.tree.map(lambda x: x[0], scanned)))
    init = (
        jax.tree.map(jnp.zeros_like, state.params),
        {k: jnp.full(s.shape, 0.0, s.dtype) for k, s in shapes.metrics.items()},
        None if plan.is_forward else ratio_lib.no_mismatch(plan),
    )
    (grads, metrics, mismatch), means = jax.lax.scan(body, init, scanned)

    if mismatch is not None:
        metrics |= ratio_lib.mismatch_metrics(mismatch)
    recorded = None if old is None else ratio_lib.OldMeans(means, old.turn + 1)
    return grads, metrics, inputs.kl_weight, recorded


def all_finite(tree: Any) -> jax.Array:
    """True when no leaf holds NaN or infinity; bool []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _averages(
    plan: Plan, state: state_lib.LearnerState, params: Any, count: jax.Array, is_last: Any
) -> dict[str, Any]:
    """The moving averages after an applied update; by name, those that the state has.

    Args:
      plan: the constants.
      state: before the update.
      params: after it.
      count: applied updates, this one included.
      is_last: whether it is the last one of its rollout; the policy that samples changes then.
    """
    averages, ema, ramp = {}, plan.config.ema, plan.config.nft

    if state.ema is not None:
        decay = averaging.warmed_up(count, ema.decay)
        # Between its turns a decay of 1 changes no bit of it.
        decay = jnp.where(count % ema.every == 0, decay, 1.0)
        averages["ema"] = averaging.mix(state.ema, params, decay)

    if state.sampling is not None:
        decay = averaging.ramp(count, ramp.decay_start, ramp.decay_rate, ramp.decay_limit)
        # The policy that samples stays as it was while the updates on its own rollout go on.
        averages["sampling"] = averaging.mix(state.sampling, params, jnp.where(is_last, decay, 1.0))

    return averages


def make_update(plan: Plan, tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """(state, batch, frozen, tolerances, old) -> (state, metrics, old).

    The update is applied only if loss, gradient and new parameters are finite, and the first one of
    a rollout only if it starts at ratio 1 and the rollout was that of its parameters (`tolerances`,
    see `ratio.Tolerances`); otherwise the state comes back unchanged (`update/applied` 0).

    `old` is `ratio.OldMeans` of no update for the first update of a rollout and handed from one to
    the next, or None with one update a rollout.
    """

    def update(
        state: state_lib.LearnerState,
        batch: UpdateBatch,
        frozen: Frozen,
        tolerances: ratio_lib.Tolerances,
        old: ratio_lib.OldMeans | None,
    ) -> tuple[state_lib.LearnerState, loss.Metrics, ratio_lib.OldMeans | None]:
        grads, metrics, kl_weight, recorded = _gradients(plan, state, batch, frozen, old)

        # The state after it. What goes in are the parameters θ_k, at which gradient and KL were
        # taken; the trust region keeps them as the previous policy of the next update.
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, **_measured_kl(plan, metrics)
        )
        params = optax.apply_updates(state.params, updates)
        is_last = old is None or old.turn == plan.config.loss.updates_per_rollout - 1
        count = trust_region.find_state(opt_state).count
        averages = _averages(plan, state, params, count, is_last)
        new = state._replace(params=params, opt_state=opt_state, **averages)

        # Applied only if all is well
        checks = {
            "update/finite_loss": jnp.isfinite(metrics["loss/total"]),
            "update/finite_gradient": all_finite(grads),
            "update/finite_params": all_finite(params),
        }
        if not plan.is_forward:
            checks["update/ratio_in_tolerance"] = ratio_lib.in_tolerance(metrics, tolerances, old)
        applied = jnp.all(jnp.stack(list(checks.values())))
        # The choice is made from numbers that all devices share: no process can decide otherwise. A
        # select, unlike a product with 0, lets no NaN through from the side that is not taken.
        state = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state)

        # What is reported
        norm = optax.tree.norm(grads)
        size = sum(x.size for x in jax.tree.leaves(grads))
        metrics |= {
            "grad/norm": norm,
            # Adam divides by |g| + eps: below 1 the step is no longer scale-free.
            "grad/rms_over_eps": norm / np.sqrt(size) / plan.config.optimizer.eps,
            "kl/weight": kl_weight,
            "update/applied": applied,
            **checks,
        }
        return state, metrics, recorded

    return update


def _measured_kl(plan: Plan, metrics: loss.Metrics) -> dict[str, Any]:
    """What the trust region is told of an update."""
    # Its targets and bounds are KLs per element, whatever is in the loss.
    elements = plan.summed_elements
    previous = metrics.get("kl/previous")
    return {
        "kl": metrics["kl/total"] / elements,
        "kl_previous": None if previous is None else previous / elements,
    }
