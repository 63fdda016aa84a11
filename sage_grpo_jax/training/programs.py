"""The compiled programs of one step: rollout, decode, update. Functions of arrays, jitted once.

`build` closes them over the recipe and gives them explicit shardings; `training/learner.py` calls
them. They are also what the TPU compile checks lower.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sage_grpo_jax.config import step_plan
from sage_grpo_jax.config.plan import Plan
from sage_grpo_jax.flow import noise, schedules
from sage_grpo_jax.flow import rollout as rollout_lib
from sage_grpo_jax.models import frames
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import micro_losses
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions; see the makers below for their arguments."""

    plan: Plan
    rollout: Callable
    sample: Callable
    decode: Callable
    finite: Callable
    update: Callable
    no_means: Callable  # () -> the old means before the first update of a rollout, or None


def make_rollout(plan: Plan):
    """(params, condition [B], frozen, keys [B], starts int32 [B]) -> Trajectory.

    That of the forward process holds its last state only, [1, B, ...].
    """
    config = plan.config.rollout

    def rollout(params, condition, frozen, keys, starts):
        initial = None
        if config.same_initial_noise:
            first = jnp.repeat(keys[:: config.group_size], config.group_size)
            initial = noise.initial_noise(first, plan.latent_shape)
        trajectory = rollout_lib.rollout(
            micro_losses.velocity_fn(plan, params, condition, frozen),
            keys,
            plan.latent_shape,
            plan.schedule,
            config.sde,
            config.eta,
            step_plan.noisy_steps(plan.steps, starts),
            clamp=config.clamp,
            initial_latents=initial,
        )
        if plan.is_forward:
            return trajectory._replace(latents=trajectory.latents[-1:])
        return trajectory

    return rollout


def make_sample(plan: Plan):
    """(params, condition [B], frozen, keys [B]) -> clean latents [B, ...] of the evaluation."""
    config = plan.config
    schedule = schedules.make_schedule(config.eval.num_steps, config.rollout.shift)
    deterministic = np.zeros(config.eval.num_steps, bool)

    def sample(params, condition, frozen, keys):
        velocity = micro_losses.velocity_fn(plan, params, condition, frozen, schedule)
        return rollout_lib.rollout(
            velocity, keys, plan.latent_shape, schedule, "ode", 0.0, deterministic
        ).latents[-1]

    return sample


def make_decode(plan: Plan):
    """(vae parameters, latents [B], piece int32 []) -> uint8 frames [decode_batch, F, H, W, 3].

    Piece p holds the samples `p + (B/decode_batch)·row`, see `update.split_batch`.
    """
    model = plan.config.model

    def decode(vae_params, latents, piece, size):
        chunk = update_lib.split_batch(latents, size)[piece]
        return frames.decode_frames(
            vae_params, chunk, plan.vae, model.vae_tiling, model.matmul_precision
        )

    return decode


def build(
    plan: Plan,
    tx: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh,
    state: Any,
    base: Any = None,
) -> Programs:
    """Jits the programs with explicit shardings.

    Args:
      plan: the constants.
      tx: the optimizer of `training.optimizers.make_optimizer`.
      mesh: the device mesh; call the programs under `jax.set_mesh(mesh)`.
      state: an abstract `LearnerState` with shardings.
      base: with LoRA the frozen weights, abstract with shardings; else None.
    """
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    trajectory = rollout_lib.Trajectory(sharding.batch_sharding(mesh, 1), whole)
    placed = state_lib.shardings_of(state)
    frozen = micro_losses.Frozen(whole, state_lib.shardings_of(base))
    batch = update_lib.UpdateBatch(trajectory.latents, rows, rows, rows, rows, rows)
    old = ratio_lib.abstract_old_means(plan, mesh)
    old_placed = state_lib.shardings_of(old)

    return Programs(
        plan=plan,
        rollout=jax.jit(
            make_rollout(plan),
            in_shardings=(placed.params, rows, frozen, rows, rows),
            out_shardings=trajectory,
        ),
        sample=jax.jit(
            make_sample(plan),
            in_shardings=(placed.params, rows, frozen, rows),
            out_shardings=rows,
        ),
        decode=jax.jit(
            make_decode(plan),
            static_argnames="size",
            out_shardings=rows,
        ),
        finite=jax.jit(frames.finite_samples, out_shardings=whole),
        # One program for all updates of a rollout: what the first one records, the later ones
        # compare with means of the same rounding.
        update=jax.jit(
            update_lib.make_update(plan, tx),
            donate_argnums=(0, 4),
            in_shardings=(placed, batch, frozen, whole, old_placed),
            out_shardings=(placed, whole, old_placed),
        ),
        no_means=jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), old),
            out_shardings=old_placed,
        ),
    )
