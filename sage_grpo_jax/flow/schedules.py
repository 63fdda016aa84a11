"""Noise schedules: the σ grid from pure noise (1) to data (0) and the timesteps of the model."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The model reads 1000·σ: its timestep embedding was trained on that range.
TIMESTEP_SCALE = 1000.0


class Schedule(NamedTuple):
    """The σ of every state of a denoising chain of T steps, and the timestep of every step."""

    sigmas: jax.Array  # f32[T + 1], strictly decreasing, first 1, last 0
    timesteps: jax.Array  # f32[T], 1000·σ at the start of each step


def host_schedule(num_steps: int, shift: float) -> Schedule:
    """`make_schedule` as NumPy arrays: starts no JAX backend, so that configs can be checked early.

    Args:
      num_steps: T ≥ 1.
      shift: > 0; larger values spend more steps near σ = 1; 1 spaces σ evenly.

    Raises:
      ValueError: num_steps is no integer ≥ 1, or shift is no finite number > 0.
    """
    try:
        num_steps = operator.index(num_steps)
    except TypeError:
        raise ValueError(f"num_steps={num_steps!r}: must be an integer >= 1") from None
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: must be an integer >= 1")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift!r}: must be a finite number > 0")

    u = np.linspace(1.0, 0.0, num_steps + 1, dtype=np.float64)
    sigmas = shift * u / (1.0 + (shift - 1.0) * u)
    timesteps = TIMESTEP_SCALE * sigmas[:-1]
    return Schedule(sigmas.astype(np.float32), timesteps.astype(np.float32))


def make_schedule(num_steps: int, shift: float) -> Schedule:
    """Returns the shifted linear schedule σ = shift·u / (1 + (shift - 1)·u), u = 1 … 0.

    This is the schedule of the released video models and of the flow-match schedulers in diffusers.
    Computed in float64 and rounded once. Arguments and errors: see `host_schedule`.
    """
    schedule = host_schedule(num_steps, shift)
    # Concrete also when called while tracing: equalizer weights are computed on the host.
    with jax.ensure_compile_time_eval():
        return Schedule(jnp.asarray(schedule.sigmas), jnp.asarray(schedule.timesteps))


def next_timestep(schedule: Schedule, timestep: jax.Array) -> jax.Array:
    """The timestep at which the step ends that starts at `timestep`; 0 for the last step.

    Args:
      schedule: of T steps.
      timestep: f32[...], each one of `schedule.timesteps`; any other value gives NaN.
    """
    starts = jnp.asarray(schedule.timesteps)
    ends = jnp.append(starts[1:], 0.0)
    # Bits are compared: whoever asks has its timestep from this schedule.
    hit = timestep[..., None] == starts
    end = jnp.sum(jnp.where(hit, ends, 0.0), axis=-1)
    return jnp.where(jnp.any(hit, axis=-1), end, jnp.nan)
