"""Rewards of videos: decoded piece by piece, scored meanwhile, the same on every process."""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from sage_grpo_jax.common.phases import PhaseTimer
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import schema
from sage_grpo_jax.parallel import hosts
from sage_grpo_jax.policy.conditions import PromptBatch
from sage_grpo_jax.rewards import names as reward_names
from sage_grpo_jax.rewards import types as reward_types
from sage_grpo_jax.training import programs as programs_lib


class RewardModelChangedError(RuntimeError):
    """The reward server came back with another model; scores of the two can't be mixed."""


class Scorer(Protocol):
    """What scores videos: `rewards.client.RewardClient`, or a local function in tests."""

    def submit(
        self, video: np.ndarray, prompt: str, request_id: str, fps: float
    ) -> futures.Future[reward_types.RewardResult]:
        """Scores uint8 frames [F, H, W, 3]; a failed sample is a result, not an exception."""
        ...


@dataclasses.dataclass
class Scores:
    """Rewards of B samples, equal on every process."""

    values: dict[str, np.ndarray]  # reward -> float32 [B]; NaN where it is not known, or not valid
    valid: np.ndarray  # bool [B]: every reward that is optimised is known

    def weighted(self, weights: Mapping[str, float]) -> np.ndarray:
        """The sum Σ w·r of the rewards that have a weight other than 0; float32 [B]."""
        # A weight of 0 is left out, not multiplied: such a reward may be missing, and 0 · NaN is
        # NaN.
        return sum(weights[n] * self.values[n] for n in self.values if weights.get(n))

    def without(self, broken: np.ndarray) -> "Scores":
        """The same with some more samples, bool [B], that are not valid."""
        values = {n: np.where(broken, np.nan, v) for n, v in self.values.items()}
        return Scores(values, self.valid & ~broken)


class Scoring:
    """Decodes latents and asks for the rewards of the videos.

    Args:
      programs: of `training.programs.build`.
      vae_params: on the programs' mesh.
      scorer: scores videos.
      check_interrupt: called between videos and while waiting; raises to abandon the step.
    """

    def __init__(
        self,
        programs: programs_lib.Programs,
        vae_params: Any,
        scorer: Scorer,
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self.scorer = scorer
        self._programs = programs
        self._config = programs.plan.config
        self._vae_params = vae_params
        self._piece_size = plan_lib.decode_batch(self._config, programs.mesh)
        self._check_interrupt = check_interrupt

    # Videos

    def decode(self, latents: jax.Array) -> np.ndarray:
        """All frames of a batch on every process; uint8 [B, F, H, W, 3]."""
        pieces = [hosts.to_host(self._piece(latents, p)) for p in range(self._count(latents))]
        # [size, count, F, H, W, 3]: sample b is row b // count of piece b % count, so that the
        # reshape puts the batch back in order.
        return np.stack(pieces, 1).reshape(latents.shape[0], *pieces[0].shape[1:])

    def _count(self, latents: jax.Array) -> int:
        return latents.shape[0] // self._piece_size

    def _piece(self, latents: jax.Array, piece: int) -> jax.Array:
        """Every count-th video, beginning with `piece`: on the mesh, see `update.split_batch`."""
        return self._programs.decode(self._vae_params, latents, piece, size=self._piece_size)

    # Rewards

    def decode_and_score(
        self, latents: jax.Array, samples: PromptBatch, name: str, timer: PhaseTimer
    ) -> Scores:
        """Decodes piece by piece and scores each while the next one decodes.

        Args:
          latents: clean latents [B, t, h, w, C]; a sample that is not finite has no reward.
          samples: their B prompts.
          name: start of the request ids.
          timer: gets the phases `decode` and `reward`.

        Raises:
          RewardModelChangedError: see there.
        """
        # The scorer answers in threads of its own. While the program of the next piece runs, the
        # clips of this one are already on their way.
        count = self._count(latents)
        pending: dict[int, futures.Future] = {}
        for piece in range(count):
            with timer("decode"):
                frames = self._own_rows(latents, piece)
            for row, video in frames:
                b = piece + count * row
                pending[b] = self._submit(video, samples, b, name)
            self._check_interrupt()

        with timer("reward"):
            scores = self._collect(pending, len(samples.ids))

        # What was decoded from numbers that are not finite means nothing.
        finite = hosts.to_host(self._programs.finite(latents))
        if finite.all():
            return scores
        logging.warning("the rollout made %d samples that are not finite", np.sum(~finite))
        return scores.without(~finite)

    def score_videos(self, videos: np.ndarray, samples: PromptBatch, name: str) -> Scores:
        """Scores frames that every process has; uint8 [B, F, H, W, 3]. Each takes its share."""
        # Every process has all clips here; each asks for every n-th, and the answers are joined.
        share = range(jax.process_index(), len(videos), jax.process_count())
        pending = {b: self._submit(videos[b], samples, b, name) for b in share}
        return self._collect(pending, len(videos))

    def _own_rows(self, latents: jax.Array, piece: int) -> list[tuple[int, np.ndarray]]:
        """The frames of a piece that this process owns, with their rows."""
        return list(hosts.local_rows(self._piece(latents, piece)))

    def _submit(
        self, video: np.ndarray, samples: PromptBatch, b: int, name: str
    ) -> futures.Future[reward_types.RewardResult]:
        request_id = f"{name}/{samples.ids[b]}/{b}"
        return self.scorer.submit(video, samples.prompts[b], request_id, self._config.video.fps)

    def _collect(self, pending: dict[int, futures.Future], count: int) -> Scores:
        """Waits for the answers of this process, then joins those of all processes."""
        # A row is a sample, a column a reward; NaN is a reward that did not come.
        names = tuple(self._config.rewards.weights)
        # The last column tells all processes of a changed reward model.
        table = np.full((count, len(names) + 1), np.nan, np.float32)
        table[:, -1] = 0
        owned = np.zeros(count, bool)

        for b, future in pending.items():
            # The waits are short: a signal sets a flag, which has to be looked at.
            while not futures.wait([future], timeout=0.5).done:
                self._check_interrupt()
            result = future.result()
            owned[b] = True
            if result.ok:
                # A reward that is monitored only may be missing.
                table[b, :-1] = [result.scores.get(name, np.nan) for name in names]
            else:
                table[b, -1] = result.code == reward_types.FAILED_PRECONDITION
                logging.warning("sample %d has no reward: %s %s", b, result.code, result.message)

        # Never raise before this point: the other processes wait in the gather.
        table = hosts.gather_rows(table, owned)
        if table[:, -1].any():
            raise RewardModelChangedError(
                "the reward server answers with another model than at the start of the run; "
                "nothing was applied. Allowed: the same model, or a new workdir"
            )

        values = {name: table[:, i] for i, name in enumerate(names)}
        return known_scores(values, self._config.rewards)


def known_scores(values: Mapping[str, np.ndarray], rewards: schema.RewardsConfig) -> Scores:
    """`Scores` of what was measured, float32 [B] by reward.

    A sample is valid where every reward that is optimised is finite; one that is monitored only
    takes no sample out.
    """
    finite = {name: np.isfinite(column) for name, column in values.items()}
    valid = np.logical_and.reduce([finite[name] for name in rewards.optimised])
    # All rewards of a sample that is not valid are dropped, also those that came: no mean
    # is then over samples that the objective does not count.
    kept = {n: np.where(valid & finite[n], column, np.nan) for n, column in values.items()}
    return Scores(kept, valid)


def reward_metrics(scores: Scores, rewards: schema.RewardsConfig) -> dict[str, float]:
    """Means over the samples that have the reward.

    `reward/overall` is the plain sum of what is optimised, `reward/weighted` the objective. The
    others are `reward/NAME`, those that are monitored only among them.
    """

    def mean(values: np.ndarray) -> float:
        known = values[np.isfinite(values)]
        return float(np.mean(known, dtype=np.float64)) if known.size else float("nan")

    return {
        "reward/overall": mean(scores.weighted(dict.fromkeys(rewards.optimised, 1.0))),
        "reward/weighted": mean(scores.weighted(rewards.weights)),
        **{reward_names.metric(name): mean(values) for name, values in scores.values.items()},
        "reward/valid_fraction": float(np.mean(scores.valid)),
    }
