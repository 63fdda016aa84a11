"""What the reward server asks of a backend.

A backend turns one clip and its prompt into named scores. It is numpy in and plain floats out, so
that the server stays free of any accelerator framework that the trainer uses. A backend is only
ever called with requests that have passed `sage_grpo_jax.rewards.wire.check_request`.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """One reward of one clip: `raw` in the backend's own units, `normalised` what the trainer uses.

    Both must be finite; a backend that cannot score a clip raises instead of returning a number.
    """

    raw: float
    normalised: float


class BackendLostError(RuntimeError):
    """The backend cannot score anything any more (a sticky device error, a lost worker).

    The server stops serving, answers UNAVAILABLE to this and all queued requests, and exits with an
    error, so that a supervisor can start a fresh one. Any other exception fails one clip only.
    """


@dataclasses.dataclass(frozen=True)
class Limits:
    """The requests that a backend accepts; the server rejects all others before scoring."""

    # Sides in pixels; aspect: the longer side over the shorter.
    min_frames: int = 2
    max_frames: int = 256
    max_total_frames: int = 4096
    min_side: int = 8
    max_side: int = 2048
    max_aspect: float = 200.0
    max_fps: float = 240.0
    max_prompt_bytes: int = 8192


class Backend(abc.ABC):
    """A reward model that the server can host.

    Attributes:
      names: the rewards that `score` returns, always all of them.
      limits: the requests that the server lets through.
    """

    names: tuple[str, ...] = ()
    limits: Limits = Limits()

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides a score: weights, preprocessing, normalisation, code.

        Two backends with the same fingerprint give the same scores. It is constant over the life of
        the object; the trainer stops when it changes.
        """

    @abc.abstractmethod
    def score(
        self, video_uint8_FxHxWx3: np.ndarray, prompt: str, fps: float
    ) -> Mapping[str, Score]:
        """Scores one clip: a pure function, called from several threads at once.

        Args:
          video_uint8_FxHxWx3: the frames that `frame_indices` chose, read-only.
          prompt: the caption, not empty, without control characters.
          fps: frames per second of the whole clip.

        Returns:
          One `Score` for each of `names`. One that is missing or not finite fails the requests that
          ask for it, and no others.

        Raises:
          BackendLostError: nothing can be scored any more.
          Exception: any other one fails this clip only.
        """

    def frame_indices(self, total_frames: int, fps: float) -> tuple[int, ...]:
        """The frames of a clip that the backend looks at, which are all that a client sends."""
        del fps
        return tuple(range(total_frames))

    def warm_up(self) -> None:
        """Makes the backend ready: scores a small random clip, so that a broken one never serves.

        Backends whose prompts have a grammar, or whose first call is slow, override this.
        """
        side = max(32, self.limits.min_side)
        frames = min(17, self.limits.max_frames)
        video = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
        # As the frames of a request are: a backend that writes to them fails here.
        video.flags.writeable = False
        scores = self.score(video, "a red disk moves left", fps=8.0)
        check_scores(self.names, scores, self.names)


def check_scores(names: Sequence[str], scores: Mapping[str, Score], wanted: Sequence[str]) -> None:
    """Refuses an answer of a backend that is incomplete or not finite in what was asked for.

    Args:
      names: of the backend.
      scores: its answer.
      wanted: the rewards asked for, of `names`.

    Raises:
      ValueError: names the reward and what is wrong with it.
    """
    # One that nobody asked for may be missing; one that was never announced is a bug.
    if not set(wanted) <= set(scores) <= set(names):
        raise ValueError(f"backend returned scores {sorted(scores)}: must be {sorted(names)}")
    for name, score in ((name, scores[name]) for name in wanted):
        if not isinstance(score, Score):
            raise ValueError(f"score {name!r} = {score!r}: must be a Score(raw, normalised)")
        if not (math.isfinite(score.raw) and math.isfinite(score.normalised)):
            raise ValueError(f"score {name!r} = {tuple(score)}: must be finite")
