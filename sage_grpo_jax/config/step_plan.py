"""Which denoising steps of a rollout inject noise, and which of them are trained.

A sample injects noise in the steps of its window, and is trained at a share of those: the first, or
some of its own choice. Both follow from counters (rollout, prompt, sample), so that any mesh and
any resumed run finds the same steps. The forward-process objective (`nft`) trains at every noise
level, whatever the sampler injects.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.config import checks as config_checks
from sage_grpo_jax.config import schema
from sage_grpo_jax.flow import noise, schedules, sde, windows


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The steps of a recipe; arrays are bool [T]."""

    schedule: schedules.Schedule
    counted: np.ndarray  # what windows count, and positions: steps that may be trained
    noisy: np.ndarray  # inject noise, in some rollout
    trained: np.ndarray  # are trained, in some rollout
    window: int  # steps of a sample in its window
    positions: int  # how many of them are trained
    kind: str  # of the window
    window_places: int  # at how many places it can be, see `flow.windows.places`
    choice: str  # one of `windows.TRAINED_CHOICES`: which steps of the window are trained

    @property
    def draws(self) -> bool:
        """Whether every sample draws the steps that it is trained at."""
        return self.choice == "random" and self.positions < self.window

    @property
    def varies(self) -> bool:
        """Whether the trained steps differ between samples or rollouts."""
        return self.window_places > 1 or self.draws


def plan_steps(config: schema.Config) -> StepPlan:
    """Works out the steps of a recipe.

    Raises:
      ValueError: there is no step to train, or fewer than the window has.
    """
    rollout = config.rollout
    schedule = schedules.make_schedule(rollout.num_steps, rollout.shift)

    # What can be trained: steps that inject noise, or for the forward process every noise level
    noisy = sde.stochastic_steps(
        rollout.sde, schedule, rollout.eta, rollout.last_step, clamp=rollout.clamp
    )
    counted = np.ones_like(noisy) if config.loss.objective == "nft" else noisy
    config_checks.require_stochastic(rollout, counted)
    count = int(counted.sum())
    if rollout.window_size > count:
        raise ValueError(
            f"config.rollout.window_size: got {rollout.window_size}; allowed: at most the {count} "
            f"stochastic steps of {rollout.num_steps}"
        )

    # A window, and how many of its steps a sample is trained at
    window = rollout.window_size or count
    # What is whole up to rounding stays whole: 0.29 of 100 steps are 29.
    positions = math.floor(window * rollout.trained_fraction + 1e-9)
    if positions == 0:
        raise ValueError(
            f"config.rollout.trained_fraction: got {rollout.trained_fraction}, which is less than "
            f"one of {window} steps; allowed: at least {1 / window:.3g}"
        )

    # Where windows can be, bool [places, T], and the steps that are trained somewhere in them
    masks = windows.places(counted, rollout.window, window, rollout.window_motion).masks
    trained = masks
    if rollout.trained_choice == "first":
        trained = masks & (np.cumsum(masks, axis=1) <= positions)

    return StepPlan(
        schedule=schedule,
        counted=counted,
        noisy=masks.any(axis=0) & noisy,
        trained=trained.any(axis=0),
        window=window,
        positions=positions,
        kind=rollout.window,
        window_places=len(masks),
        choice=rollout.trained_choice,
    )


def window_starts(
    steps: StepPlan, config: schema.Config, step: int, prompt_hashes: np.ndarray
) -> np.ndarray:
    """How many counted steps lie before the window of each prompt in a rollout; int32 [P].

    Args:
      steps: of `config`.
      config: the recipe.
      step: number of the rollout.
      prompt_hashes: uint32 [P].
    """
    count, rollout = len(prompt_hashes), config.rollout
    if steps.kind == "random_k":
        slots = np.arange(count, dtype=np.uint32)  # its places are a step apart
        return noise.window_starts(config.seed, step, slots, prompt_hashes, steps.window_places)
    # All other windows are at one place for all prompts of a rollout.
    start = 0
    if steps.kind in windows.MOVING:
        total = int(steps.counted.sum())
        start = windows.start_at(step, steps.kind, total, steps.window, rollout.window_motion)
    return np.full(count, start, np.int32)


def noisy_steps(steps: StepPlan, starts: jax.Array) -> Any:
    """The steps that inject noise; bool [T], or [T, B] where windows differ.

    Args:
      steps: the recipe's.
      starts: int32 [B], of `window_starts`.
    """
    if steps.window_places == 1:
        return steps.noisy
    # Ranks are [T, 1], starts [B].
    rank = jnp.asarray(np.cumsum(steps.counted) - 1)[:, None]
    inside = (rank >= starts) & (rank < starts + steps.window)
    return jnp.asarray(steps.noisy)[:, None] & inside


def trained_step(steps: StepPlan, position: Any, starts: jax.Array, keys: jax.Array) -> jax.Array:
    """The `position`-th trained step; int32 [], or [m] where the steps differ.

    Args:
      steps: the recipe's.
      position: 0 to `plan.positions` - 1, int32 [].
      starts: int32 [m].
      keys: of the samples, [m].
    """
    # Windows count ranks; this gives the number of the step that has a rank.
    counted = jnp.asarray(np.flatnonzero(steps.counted), jnp.int32)
    if not steps.varies:
        return counted[position]
    if steps.draws:
        position = noise.chosen_steps(keys, steps.window, steps.positions)[:, position]
    return counted[starts + position]
