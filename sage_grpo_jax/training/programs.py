"""The compiled programs of one step: rollout, decode, update. Functions of arrays, jitted once.

`build` closes them over a run's constants and gives them explicit shardings; `training/learner.py`
calls them. They are also what the TPU compile checks lower.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.config import step_plan
from sage_grpo_jax.config.plan import Plan
from sage_grpo_jax.flow import noise, schedules
from sage_grpo_jax.flow import rollout as rollout_lib
from sage_grpo_jax.models import frames
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.policy import sampler
from sage_grpo_jax.training import micro_losses
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.blueprint import Blueprint


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions; see the makers below for their arguments."""

    blueprint: Blueprint
    rollout: Callable
    sample: Callable
    decode: Callable
    finite: Callable
    update: Callable
    no_means: Callable  # () -> the old means before the first update of a rollout, or None

    @property
    def plan(self) -> Plan:
        """The constants that the programs are closed over."""
        return self.blueprint.plan

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices that the programs run on."""
        return self.blueprint.mesh


def make_rollout(plan: Plan) -> Callable[..., rollout_lib.Trajectory]:
    """(params, condition [B], frozen, keys [B], starts int32 [B]) -> flat Trajectory.

    That of the forward process holds its last state only, [1, B, N]. The samples of a device go
    through the network `loss.micro_batch` at a time (of the whole mesh), as in the update.
    """
    config = plan.config.rollout

    def join(pieces: jax.Array) -> jax.Array:
        """[pieces, T, m, ...] -> [T, B, ...], see `update.split_batch`; stds may lack the m."""
        if pieces.ndim == 2:
            return pieces[0]  # the steps inject the same noise in every sample
        together = jnp.moveaxis(pieces, 0, 2)
        return together.reshape(together.shape[0], -1, *together.shape[3:])

    sample = sampler.make_rollout(
        plan.transformer,
        sampler.Sampling(
            schedule=plan.schedule,
            latent_shape=plan.latent_shape,
            kind=config.sde,
            eta=config.eta,
            clamp=config.clamp,
            guidance=micro_losses.guidance_of(plan),
        ),
    )

    def rollout(
        params: Any,
        condition: Any,
        frozen: micro_losses.Frozen,
        keys: jax.Array,
        starts: jax.Array,
    ) -> rollout_lib.Trajectory:
        initial = None
        if config.same_initial_noise:
            # Every sample takes the key of the first one of its group: groups lie in a row in a
            # batch. The noise of the steps still comes from each sample's own key.
            first = jnp.repeat(keys[:: config.group_size], config.group_size)
            initial = noise.initial_noise(first, plan.latent_shape)

        def piece(given: tuple[Any, ...]) -> rollout_lib.Trajectory:
            condition, keys, starts, initial = given
            trajectory = sample(
                micro_losses.policy_of(plan, params, frozen),
                condition,
                frozen.negative,
                keys,
                stochastic=step_plan.noisy_steps(plan.steps, starts),
                initial_latents=initial,
                flat=True,
            )
            # The loss noises the clean samples by itself: the other T states need not be kept.
            if plan.is_forward:
                return trajectory._replace(latents=trajectory.latents[-1:])
            return trajectory

        size = plan.config.loss.micro_batch
        given = (condition, keys, starts, initial)
        if size == plan.config.batch_size:
            return piece(given)
        found = jax.lax.map(piece, update_lib.split_batch(given, size))
        return jax.tree.map(join, found)

    return rollout


def make_sample(plan: Plan) -> Callable[..., jax.Array]:
    """(params, condition [B], frozen, keys [B]) -> clean latents [B, ...] of the evaluation."""
    config = plan.config
    # The policy samples as it would be used: by the ODE, in as many steps as the evaluation has.
    sampling = sampler.Sampling(
        schedule=schedules.make_schedule(config.eval.num_steps, config.rollout.shift),
        latent_shape=plan.latent_shape,
        kind="ode",
        guidance=micro_losses.guidance_of(plan),
    )
    rollout = sampler.make_rollout(plan.transformer, sampling)

    def sample(
        params: Any, condition: Any, frozen: micro_losses.Frozen, keys: jax.Array
    ) -> jax.Array:
        policy = micro_losses.policy_of(plan, params, frozen)
        return rollout(policy, condition, frozen.negative, keys).latents[-1]

    return sample


def make_decode(plan: Plan) -> Callable[..., jax.Array]:
    """(vae_params, latents [B, ...] or flat, piece, size) -> frames, see `sampler.make_decode`."""
    model = plan.config.model
    decode_clips = sampler.make_decode(plan.vae, model.vae_tiling, model.matmul_precision)

    def decode(vae_params: Any, latents: jax.Array, piece: Any, size: int) -> jax.Array:
        return decode_clips(vae_params, latents.reshape(-1, *plan.latent_shape), piece, size)

    return decode


def abstract_states(plan: Plan, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """The flat states [T + 1, B, N] of a rollout: B over the batch axes, N over `context`."""
    steps = 1 if plan.is_forward else plan.config.rollout.num_steps + 1
    size = int(np.prod(plan.latent_shape))
    within = "context" if size % mesh.shape["context"] == 0 else None
    place = jax.NamedSharding(mesh, jax.P(*sharding.batch_sharding(mesh, 1).spec, within))
    shape = (steps, plan.config.batch_size, size)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)


def build(blueprint: Blueprint) -> Programs:
    """Jits the programs with explicit shardings; call them under `jax.set_mesh(blueprint.mesh)`."""
    plan, mesh = blueprint.plan, blueprint.mesh
    # Samples are divided over the devices, along axis 1 where the steps come first.
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    trajectory = rollout_lib.Trajectory(abstract_states(plan, mesh).sharding, whole)
    placed = state_lib.shardings_of(blueprint.state)
    frozen = micro_losses.Frozen(whole, state_lib.shardings_of(blueprint.base))
    batch = update_lib.UpdateBatch(trajectory.latents, rows, rows, rows, rows, rows)

    old = ratio_lib.abstract_old_means(plan, mesh)
    old_placed = state_lib.shardings_of(old)

    return Programs(
        blueprint=blueprint,
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
            # The piece is an argument and its size is not: one program decodes all pieces.
            make_decode(plan),
            static_argnames="size",
            out_shardings=rows,
        ),
        finite=jax.jit(frames.finite_samples, out_shardings=whole),
        # One program for all updates of a rollout: what the first one records, the later ones
        # compare with means of the same rounding.
        update=jax.jit(
            update_lib.make_update(plan, blueprint.optimizer),
            # State and old means are replaced by what comes back, so their memory is given away.
            # The rollout is not: the next update on it reads it again.
            donate_argnums=(0, 4),
            in_shardings=(placed, batch, frozen, whole, old_placed),
            out_shardings=(placed, whole, old_placed),
        ),
        # The devices make them: no process could fill the parts of the others.
        no_means=jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), old),
            out_shardings=old_placed,
        ),
    )
