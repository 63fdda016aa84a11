"""Windows of denoising steps: which steps of a rollout inject noise, and when the window moves on.

A window counts the steps that can inject noise, from noise to data. The moving ones (MixGRPO) go
from the first of them to the last; where they are is a function of the number of the rollout alone,
so that a run that is resumed, or another mesh, finds the same place.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from sage_grpo_jax.common import fields
from sage_grpo_jax.flow import sde

MOVING = ("progressive", "decay", "dynamic")
WINDOWS = ("all", "first_k", "random_k", *MOVING)
# Which steps of the window a sample is trained at, where that is a part of them.
TRAINED_CHOICES = ("first", "random")


@dataclasses.dataclass(frozen=True)
class Motion:
    """How a moving window moves on: every so many rollouts by so many steps.

    Attributes:
      stay: rollouts at a place; of `decay` and `dynamic` at the first one.
      stride: steps to the next place.
      least_stay: `decay` stays stay·(1 - p) + least_stay·p, p the share of the steps that lie
        before the window; rounded down.
      threshold, rate: `dynamic` stays stay·exp(-rate·max(0, t - threshold)), t the number of
        steps before the window; rounded down, at least 1.
      restart: after the last place the window starts again; otherwise it stays there.

    Source: MixGRPO, fastvideo/utils/grpo_states.py; `dynamic` (there `exp_decay`) rounds down and
    restarts as the strategy of that name in Tencent's own trainers.
    """

    stay: int = fields.bounded(25, least=1)
    stride: int = fields.bounded(1, least=1)
    least_stay: int = fields.bounded(1, least=1)
    threshold: int = fields.bounded(12, least=0)
    rate: float = fields.bounded(0.5, least=0)
    restart: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is out of range."""
        fields.check(self)
        fits = self.least_stay <= self.stay
        fields.require(fits, self, "least_stay", f"at most stay={self.stay}")


class Places(NamedTuple):
    """Where a window can be."""

    masks: np.ndarray  # bool[places, T]: the steps in it
    shares: np.ndarray  # f64[places]: of the rollouts that find it there; they sum to 1


def places(
    stochastic: np.ndarray, window: str = "all", size: int = 0, motion: Motion | None = None
) -> Places:
    """Returns every place of a window, and how many of the rollouts find it there.

    Args:
      stochastic: bool[T], the steps that can inject noise; a window counts these only.
      window: `all`; `first_k`, the first `size` of them; `random_k`, `size` of them in a row,
        each place as likely as the others; or one of MOVING, whose shares are those of one pass
        from the first place to the last.
      size: of the window, ≥ 1; more steps than there are is all of them. Not read for `all`.
      motion: of a moving window; not read for the others.
    """
    sde.check_choice("window", window, WINDOWS)
    stochastic = np.asarray(stochastic, bool)
    count = int(np.sum(stochastic))
    size = count if window == "all" else min(size, count)

    # The rank of a step is how many stochastic steps lie before it. Starts are [places, 1], ranks
    # [T].
    starts = _starts(window, count, size, motion)[:, None]
    rank = np.cumsum(stochastic) - 1
    masks = stochastic & (rank >= starts) & (rank < starts + size)

    stays = _stays(window, count, size, motion)
    return Places(masks, stays / stays.sum())


def start_at(step: int, window: str, count: int, size: int, motion: Motion | None = None) -> int:
    """Returns how many steps lie before a moving window in rollout `step`, counted from 0.

    Args:
      step: number of the rollout.
      window: one of MOVING.
      count: steps that can inject noise.
      size: of the window, 1 to count.
      motion: how it moves.
    """
    sde.check_choice("window", window, MOVING)
    motion = motion or Motion()
    # The ends are rollouts of one pass; after the last one the window starts again or stays.
    ends = np.cumsum(_stays(window, count, size, motion))
    if motion.restart:
        step = step % int(ends[-1])
    place = int(np.searchsorted(ends, step, side="right"))
    return int(_starts(window, count, size, motion)[min(place, len(ends) - 1)])


def _starts(window: str, count: int, size: int, motion: Motion | None) -> np.ndarray:
    """The steps before the window at each of its places, int64[places]."""
    if window in ("all", "first_k"):
        return np.zeros(1, np.int64)
    stride = (motion or Motion()).stride if window in MOVING else 1
    return np.arange(0, count - size + 1, stride)


def _stays(window: str, count: int, size: int, motion: Motion | None) -> np.ndarray:
    """Rollouts at each place in a row, int64[places]; 1 where windows do not move."""
    starts, motion = _starts(window, count, size, motion), motion or Motion()
    if window == "progressive":
        stays = np.full(len(starts), motion.stay, np.float64)
    elif window == "decay":
        before = starts / count
        stays = motion.stay * (1.0 - before) + motion.least_stay * before
    elif window == "dynamic":
        stays = motion.stay * np.exp(-motion.rate * np.maximum(starts - motion.threshold, 0))
    else:
        stays = np.ones(len(starts))
    # What is whole up to rounding stays whole.
    return np.maximum(np.floor(stays + 1e-9).astype(np.int64), 1)
