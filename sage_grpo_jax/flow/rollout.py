"""The sampler: a chain of denoising steps, stochastic where the policy is to be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from sage_grpo_jax.flow import noise as noise_lib
from sage_grpo_jax.flow import sde
from sage_grpo_jax.flow.schedules import Schedule

# velocity_fn(latents f32[B, ...], timestep f32[B]) -> velocity [B, ...]
VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]


class Trajectory(NamedTuple):
    """All states of a rollout. The injected noise is not stored: `noise.step_noise` repeats it."""

    latents: jax.Array  # f32[T + 1, B, ...], from noise to data; kept flat f32[T + 1, B, N]
    # f32[T], or [T, B] where samples differ: std of the noise that each step injected, 0 where it
    # was deterministic.
    stds: jax.Array


def rollout(
    velocity_fn: VelocityFn,
    keys: jax.Array,
    latent_shape: tuple[int, ...],
    schedule: Schedule,
    kind: str,
    eta: Any,
    stochastic: Any,
    *,
    clamp: float = 0.0,
    initial_latents: jax.Array | None = None,
    flat: bool = False,
) -> Trajectory:
    """Samples one video latent per key and keeps the whole chain, in float32.

    One scan over the T steps, to be called inside jit; sharding follows the keys. Sample b depends
    on keys[b] alone, whatever the batch.

    Args:
      velocity_fn: the guided model, velocity_fn(latents [B, ...], timestep [B]).
      keys: typed keys[B], one per sample (`noise.sample_keys`).
      latent_shape: shape of one sample's latents, without the batch.
      schedule: T steps.
      kind, eta: the transition of the stochastic steps, see `sde.transition`.
      stochastic: bool[T], or bool[T, B] where samples differ; the other steps follow the ODE and
        inject nothing.
      clamp: of the stochastic steps, see `sde.step_coefficients`.
      initial_latents: f32[B, *latent_shape] at σ = 1; drawn from the keys by default.
      flat: keep every state as N numbers a sample. A TPU pads the last two axes of an array to
        tiles of 8 x 128: whole states would take several times what they weigh.
    """
    noise_lib.check_keys(keys)
    sde.check_kind_and_eta(kind, eta)

    # Schedule and initial state
    latent_shape = tuple(latent_shape)
    sigmas, timesteps = jnp.asarray(schedule.sigmas), jnp.asarray(schedule.timesteps)
    stochastic = jnp.asarray(stochastic, bool)
    chex.assert_shape(timesteps, (sigmas.shape[0] - 1,))
    chex.assert_shape(stochastic, (*timesteps.shape, *keys.shape)[: max(stochastic.ndim, 1)])

    if initial_latents is None:
        initial_latents = noise_lib.initial_noise(keys, latent_shape)
    initial_latents = initial_latents.astype(jnp.float32)
    chex.assert_shape(initial_latents, (*keys.shape, *latent_shape))

    def kept(latents: jax.Array) -> jax.Array:
        return latents.reshape(latents.shape[0], -1) if flat else latents

    # The chain
    def step(
        latents: jax.Array, inputs: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        t, sigma, sigma_next, timestep, is_stochastic = inputs
        velocity = velocity_fn(latents, jnp.full(keys.shape, timestep, jnp.float32))
        # The state stays float32 whatever the network computes in: short steps would be lost in
        # the rounding of bfloat16.
        velocity = velocity.astype(jnp.float32)

        # The transition where noise is injected, the step of the ODE elsewhere.
        mean, std = sde.transition(kind, velocity, latents, sigma, sigma_next, eta, clamp=clamp)
        std = jnp.where(is_stochastic, std, 0.0)
        axes = (1,) * (latents.ndim - 1)  # of one sample
        noisy = is_stochastic.reshape(is_stochastic.shape + axes)
        mean = jnp.where(noisy, mean, latents + (sigma_next - sigma) * velocity)

        noise = noise_lib.step_noise(keys, t, latent_shape)
        latents = mean + std.reshape(std.shape + axes) * noise
        return latents, (kept(latents), std)

    steps = jnp.arange(timesteps.shape[0])
    inputs = (steps, sigmas[:-1], sigmas[1:], timesteps, stochastic)
    _, (later_latents, stds) = jax.lax.scan(step, initial_latents, inputs)
    return Trajectory(jnp.concatenate([kept(initial_latents)[None], later_latents]), stds)


def behaviour_mean(next_latents: jax.Array, noise: jax.Array, std: Any) -> jax.Array:
    """Returns the mean that the rollout used for a step: next_latents - std·noise, [B, ...].

    Args:
      next_latents: state after the step, f32[B, ...].
      noise: `step_noise` of the same keys and step, f32[B, ...].
      std: of that step, scalar or [B].
    """
    chex.assert_equal_shape([next_latents, noise])
    std = jnp.asarray(std, jnp.float32)
    return next_latents - std.reshape(std.shape + (1,) * (noise.ndim - std.ndim)) * noise
