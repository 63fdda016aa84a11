"""The compiled programs of one step: rollout, decode, update. Functions of arrays, jitted once.

`build` closes them over the recipe and gives them explicit shardings; `training/learner.py` calls
them. They are also what the TPU compile checks lower.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sage_grpo_jax.flow import guidance, noise, schedules, sde
from sage_grpo_jax.flow import rollout as rollout_lib
from sage_grpo_jax.grpo import equalizer, kl, loss, trust_region
from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import state as state_lib


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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The constants of the programs: networks' configs, schedule, trained steps and weights."""

    config: config_lib.Config
    transformer: hunyuan_video.HunyuanVideoConfig
    vae: vae.VaeConfig
    schedule: schedules.Schedule
    trained: np.ndarray  # bool [T]
    weights: np.ndarray  # float32 [T]: S_t, or 1 without the equalizer

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Frames, height, width, channels of one latent clip."""
        video = self.config.video
        return (
            (video.frames - 1) // self.vae.temporal_compression_ratio + 1,
            video.height // self.vae.spatial_compression_ratio,
            video.width // self.vae.spatial_compression_ratio,
            self.vae.latent_channels,
        )


@dataclasses.dataclass(frozen=True)
class UpdatePrograms:
    """The update, compiled for batches without and with replayed means."""

    plain: Callable
    with_means: Callable

    def __call__(self, state, batch: UpdateBatch, negative, tolerance):
        """See `make_update`."""
        program = self.plain if batch.mean_old is None else self.with_means
        return program(state, batch, negative, tolerance)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions; see the makers below for their arguments."""

    recipe: Recipe
    rollout: Callable
    sample: Callable
    decode: Callable
    update: UpdatePrograms
    replay: Callable


def make_recipe(
    config: config_lib.Config,
    transformer: hunyuan_video.HunyuanVideoConfig,
    vae_config: vae.VaeConfig,
) -> Recipe:
    """Works out schedule, trained steps and time weights; checks the clip against the networks.

    Raises:
      ValueError: clip sizes that the VAE cannot make, networks that do not fit each other, or a
        schedule without a single stochastic step.
    """
    _check_sizes(config.video, vae_config)
    if transformer.out_channels != vae_config.latent_channels:
        raise ValueError(
            f"config.model: the transformer makes {transformer.out_channels} latent channels, "
            f"the VAE decodes {vae_config.latent_channels}; allowed: networks that fit"
        )
    rollout = config.rollout
    schedule = schedules.make_schedule(rollout.num_steps, rollout.shift)
    trained = sde.stochastic_steps(rollout.sde, schedule, rollout.eta, last_step=rollout.last_step)
    if not trained.any():
        raise ValueError(
            f"config.rollout: num_steps={rollout.num_steps}, sde={rollout.sde!r}, "
            f"last_step={rollout.last_step!r} leaves no stochastic step to train; allowed: more "
            "steps, or last_step=stochastic"
        )
    weights = trained.astype(np.float32)
    if config.loss.equalizer:
        weights = equalizer.equalizer_weights(
            rollout.sde, schedule, rollout.eta, trained, log_prob=config.loss.log_prob
        )
    return Recipe(config, transformer, vae_config, schedule, trained, np.asarray(weights))


def _check_sizes(video: config_lib.VideoConfig, vae_config: vae.VaeConfig) -> None:
    temporal, spatial = vae_config.temporal_compression_ratio, vae_config.spatial_compression_ratio
    if (video.frames - 1) % temporal:
        raise ValueError(
            f"config.video.frames: got {video.frames}; allowed: 1 + a multiple of {temporal}"
        )
    for name in ("height", "width"):
        if getattr(video, name) % spatial:
            raise ValueError(
                f"config.video.{name}: got {getattr(video, name)}; allowed: a multiple of {spatial}"
            )


def _velocity_fn(recipe: Recipe, params: Any, condition: Any, negative: Any):
    """(latents, timestep) -> velocity, with guidance.

    `negative` is the one unconditional prompt, leaves [1, ...].
    """
    scale = recipe.config.rollout.guidance
    batch = jax.tree.leaves(condition)[0].shape[0]
    negative = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), negative)

    def model(latents, timestep, branch_condition):
        with jax.default_matmul_precision(recipe.config.model.matmul_precision):
            return hunyuan_video.velocity(
                params, latents, timestep, branch_condition, recipe.transformer
            )

    guided = guidance.guided(model, scale, mode=recipe.config.rollout.guidance_mode)
    return lambda latents, timestep: guided(latents, timestep, condition, negative)


def make_rollout(recipe: Recipe, *, kind: str, schedule: schedules.Schedule, stochastic):
    """(params, condition [B], negative [1], keys [B]) -> Trajectory."""
    config = recipe.config.rollout

    def rollout(params, condition, negative, keys):
        velocity = _velocity_fn(recipe, params, condition, negative)
        return rollout_lib.rollout(
            velocity, keys, recipe.latent_shape, schedule, kind, config.eta, stochastic
        )

    return rollout


def split_batch(tree: Any, size: int) -> Any:
    """[B, ...] -> [B/size, size, ...], each piece taking its share of every device.

    Sample b lands in piece b % (B/size) at row b // (B/size): axis 0 stays the one that the mesh
    divides, and no data moves between devices.
    """

    def split(x):
        return jnp.moveaxis(x.reshape(size, x.shape[0] // size, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def make_decode(recipe: Recipe):
    """(vae parameters, latents [B], piece int32 []) -> uint8 frames [decode_batch, F, H, W, 3].

    Piece p holds the samples `p + (B/decode_batch)·row`, see `split_batch`.
    """

    def decode(vae_params, latents, piece, size):
        chunk = split_batch(latents, size)[piece]
        with jax.default_matmul_precision(recipe.config.model.matmul_precision):
            videos = vae.decode(vae_params, chunk / recipe.vae.scaling_factor, recipe.vae)
        return to_uint8(videos)

    return decode


def to_uint8(videos: jax.Array) -> jax.Array:
    """[-1, 1] float -> 0..255, rounded. NaN becomes 0: callers check the latents for finiteness."""
    pixels = jnp.clip(videos * 127.5 + 127.5, 0, 255)
    return jnp.round(jnp.nan_to_num(pixels)).astype(jnp.uint8)


def _micro_batch(batch: UpdateBatch, size: int, step: jax.Array, piece: jax.Array) -> MicroBatch:
    def take(x):
        return split_batch(x, size)[piece]

    return MicroBatch(
        step=step,
        latents=take(batch.latents[step]),
        next_latents=take(batch.latents[step + 1]),
        keys=take(batch.keys),
        condition=jax.tree.map(take, batch.condition),
        advantages=take(batch.advantages),
        valid=take(batch.valid),
        mean_old=None if batch.mean_old is None else take(batch.mean_old[step]),
    )


def _transition(recipe: Recipe, params: Any, micro: MicroBatch, negative: Any) -> sde.Transition:
    """The transition of the policy `params` at the states of a micro-batch."""
    config, schedule = recipe.config.rollout, recipe.schedule
    count = micro.latents.shape[0]
    velocity_fn = _velocity_fn(recipe, params, micro.condition, negative)
    timestep = jnp.broadcast_to(jnp.asarray(schedule.timesteps)[micro.step], (count,))
    sigmas = jnp.asarray(schedule.sigmas)
    return sde.transition(
        config.sde,
        velocity_fn(micro.latents, timestep),
        micro.latents,
        sigmas[micro.step],
        sigmas[micro.step + 1],
        config.eta,
    )


def _micro_loss(params, micro: MicroBatch, negative, references, kl_weight, normalizer, recipe):
    """Policy loss and KL of one micro-batch, both divided by the fixed `normalizer`."""
    new = _transition(recipe, params, micro, negative)
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
        mean = jax.lax.stop_gradient(_transition(recipe, reference, micro, negative).mean)
        divergence = kl.gaussian_kl(new.mean, mean, new.std)
        divergence = jnp.sum(jnp.where(micro.valid, divergence, 0.0)) / normalizer
        metrics[f"kl/{name}"] = jax.lax.stop_gradient(divergence)
        penalty += beta * divergence
    total = policy_loss + kl_weight * penalty
    metrics |= {"loss/policy": policy_loss, "loss/total": total, "kl/total": penalty}
    return total, jax.lax.stop_gradient(metrics)


def _accumulate(totals: dict, metrics: dict) -> dict:
    """Sums, except for the names that are maxima."""
    return {
        name: jnp.maximum(totals[name], value) if "/max_" in name else totals[name] + value
        for name, value in metrics.items()
    }


def _gradients(recipe: Recipe, state: state_lib.LearnerState, batch: UpdateBatch, negative):
    """Gradient and metrics of the whole rollout, accumulated over (step, sample) micro-batches."""
    config = recipe.config
    region = trust_region.find_state(state.opt_state)
    references = trust_region.references(region, config.trust_region)
    steps = np.flatnonzero(recipe.trained)
    pieces = config.batch_size // config.loss.micro_batch
    normalizer = jnp.maximum(jnp.sum(batch.valid) * len(steps), 1).astype(jnp.float32)

    def loss_fn(params, micro):
        return _micro_loss(params, micro, negative, references, region.weight, normalizer, recipe)

    def body(totals, index):
        micro = _micro_batch(batch, config.loss.micro_batch, index[0], index[1])
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, micro)
        return (jax.tree.map(jnp.add, totals[0], grads), _accumulate(totals[1], metrics)), None

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
    """(state, batch, negative, tolerance) -> (state, metrics).

    The update is applied only if loss, gradient and new parameters are finite and no ratio is
    further than `tolerance` from 1; otherwise the state comes back unchanged (`update/applied` 0).
    """

    def update(state, batch, negative, tolerance):
        grads, metrics, kl_weight = _gradients(recipe, state, batch, negative)
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
    """(params, batch, negative) -> transition means [T, B, ...] by the update's own forward pass.

    Where low precision makes the update program disagree with the rollout, its means replace those
    of the rollout, so that the ratio starts at 1. Untrained steps stay 0.
    """
    size = recipe.config.loss.micro_batch

    def replay(params, batch, negative):
        pieces = jnp.arange(recipe.config.batch_size // size)

        def at_step(step):
            def piece_mean(piece):
                micro = _micro_batch(batch, size, step, piece)
                return _transition(recipe, params, micro, negative).mean

            means = jnp.moveaxis(jax.lax.map(piece_mean, pieces), 0, 1)
            return means.reshape(batch.latents.shape[1:])

        steps = np.flatnonzero(recipe.trained)
        means = jax.lax.map(at_step, jnp.asarray(steps, jnp.int32))
        return jnp.zeros_like(batch.latents[1:]).at[steps].set(means)

    return replay


def build(
    recipe: Recipe, tx: optax.GradientTransformationExtraArgs, mesh: jax.sharding.Mesh, state: Any
) -> Programs:
    """Jits the programs with explicit shardings.

    Args:
      recipe: the constants.
      tx: the optimizer of `training.state.make_optimizer`.
      mesh: the device mesh; call the programs under `jax.set_mesh(mesh)`.
      state: an abstract `LearnerState` with shardings.
    """
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    trajectory = rollout_lib.Trajectory(sharding.batch_sharding(mesh, 1), whole)
    placed = state_lib.shardings_of(state)
    batch = UpdateBatch(trajectory.latents, rows, rows, rows, rows, None)
    replayed = batch._replace(mean_old=trajectory.latents)
    evaluation = schedules.make_schedule(recipe.config.eval.num_steps, recipe.config.rollout.shift)
    update = make_update(recipe, tx)

    plain, with_means = (
        jax.jit(
            update,
            donate_argnums=0,
            in_shardings=(placed, layout, whole, whole),
            out_shardings=(placed, whole),
        )
        for layout in (batch, replayed)
    )

    def jit_rollout(**kwargs):
        return jax.jit(
            make_rollout(recipe, **kwargs),
            in_shardings=(placed.params, rows, whole, rows),
            out_shardings=trajectory,
        )

    return Programs(
        recipe=recipe,
        rollout=jit_rollout(
            kind=recipe.config.rollout.sde, schedule=recipe.schedule, stochastic=recipe.trained
        ),
        sample=jit_rollout(
            kind="ode", schedule=evaluation, stochastic=np.zeros(recipe.config.eval.num_steps, bool)
        ),
        decode=jax.jit(
            make_decode(recipe),
            static_argnames="size",
            out_shardings=rows,
        ),
        update=UpdatePrograms(plain, with_means),
        replay=jax.jit(
            make_replay(recipe),
            in_shardings=(placed.params, batch, whole),
            out_shardings=trajectory.latents,
        ),
    )


def check_mesh(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
    """Checks that every batch divides over the mesh.

    Raises:
      ValueError: with the field and what is allowed.
    """
    shards = mesh_lib.batch_shards(mesh)
    for path, value in (
        ("loss.micro_batch", config.loss.micro_batch),
        ("rollout.decode_batch", config.rollout.decode_batch),
    ):
        if value % shards:
            raise ValueError(
                f"config.{path}: got {value}; allowed: a multiple of data × fsdp = {shards}"
            )
