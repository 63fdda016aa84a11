"""One step of SAGE-GRPO: rollout -> decode -> rewards -> advantages -> update."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sage_grpo_jax.checks import shadow
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import step_plan
from sage_grpo_jax.flow import noise
from sage_grpo_jax.grpo import advantage
from sage_grpo_jax.parallel import hosts, sharding
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy.conditions import PromptBatch
from sage_grpo_jax.rewards import types as reward_types
from sage_grpo_jax.training import micro_losses, optimizers
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib

NumericsError = ratio_lib.NumericsError


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

    values: dict[str, np.ndarray]  # dimension -> float32 [B]; NaN where invalid
    valid: np.ndarray  # bool [B]

    def weighted(self, weights: Mapping[str, float]) -> np.ndarray:
        """The reward that is optimised; float32 [B]."""
        return sum(weights[name] * self.values[name] for name in self.values)


class PhaseTimer:
    """Seconds by phase: `with timer("rollout"): ...` adds to `time/rollout`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name: str | None = None
        self._start = 0.0

    def __call__(self, name: str) -> "PhaseTimer":
        self._name = f"time/{name}"
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc_info: object) -> None:
        elapsed = time.perf_counter() - self._start
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + elapsed


class Learner:
    """The algorithm around the compiled programs; holds no trained state itself."""

    def __init__(
        self,
        programs: programs_lib.Programs,
        vae_params: Any,
        negative: PromptBatch,
        scorer: Scorer,
        mesh: jax.sharding.Mesh,
        check_interrupt: Callable[[], None] = lambda: None,
        base: Any = None,
    ) -> None:
        """
        Args:
          programs: of `training.programs.build`.
          vae_params: on the mesh.
          negative: the one unconditional prompt of guidance.
          scorer: scores videos.
          mesh: the device mesh.
          check_interrupt: called between phases; raises to abandon the step.
          base: with LoRA the frozen weights, on the mesh; None for full fine-tuning.
        """
        self.programs = programs
        self.plan = programs.plan
        self.config = programs.plan.config
        self._vae_params = vae_params
        self._scorer = scorer
        self._mesh = mesh
        self._check_interrupt = check_interrupt
        self._rows = sharding.batch_sharding(mesh)
        whole = sharding.replicated(mesh)
        self.frozen = micro_losses.Frozen(self.condition(negative, whole), base)
        self._shadow = shadow.Shadow(self.plan) if self.config.debug.shadow else None

    def step(
        self, state: state_lib.LearnerState, batch: PromptBatch
    ) -> tuple[state_lib.LearnerState, dict[str, float]]:
        """One rollout of P prompts × G samples and the updates on it.

        Args:
          state: the trained state; its buffers are given away.
          batch: P prompts.

        Returns:
          The next state (step + 1) and the metrics of the step.

        Raises:
          NumericsError: the gate on ratio and rollout failed.
        """
        timer, started = PhaseTimer(), time.perf_counter()
        samples = batch.repeat(self.config.rollout.group_size)
        keys = self.sample_keys(batch, int(state.step))
        starts = self.window_starts(batch, int(state.step))
        condition = self.condition(samples)
        with timer("rollout"):
            policy = state.sampled
            trajectory = self.programs.rollout(policy, condition, self.frozen, keys, starts)
            jax.block_until_ready(trajectory)
        self._check_interrupt()
        scores = self.score(trajectory.latents[-1], samples, f"step{int(state.step)}", timer)
        scores = self._without_broken(scores, trajectory.latents[-1])
        advantages, reward_metrics = self.advantages(scores)
        self._check_interrupt()
        update_batch = update_lib.UpdateBatch(
            trajectory.latents,
            keys,
            condition,
            hosts.to_global(advantages, self._rows),
            hosts.to_global(scores.valid, self._rows),
            starts,
        )
        if self._enough(scores):
            checks = self._shadow(state, update_batch, self.frozen) if self._shadow else {}
            with timer("update"):
                state, metrics = self.update(state, update_batch)
            metrics |= checks
        else:
            metrics = {"update/applied": 0.0}
        state = state._replace(step=state.step + 1)
        timer.seconds["time/step"] = time.perf_counter() - started
        return state, {**reward_metrics, **metrics, **timer.seconds}

    def _without_broken(self, scores: Scores, latents: jax.Array) -> Scores:
        """Takes the samples out whose latents are not finite: what was decoded means nothing."""
        finite = hosts.to_host(self.programs.finite(latents))
        if finite.all():
            return scores
        logging.warning("the rollout made %d samples that are not finite", np.sum(~finite))
        values = {n: np.where(finite, v, np.nan) for n, v in scores.values.items()}
        return Scores(values, scores.valid & finite)

    def sample_keys(self, batch: PromptBatch, step: int) -> jax.Array:
        """One key per sample, [P·G]: a function of seed, step, slot, prompt and sample alone."""
        group = self.config.rollout.group_size
        count = len(batch.ids)
        hashes = np.array([noise.prompt_hash(i) for i in batch.ids], np.uint32)
        keys = noise.sample_keys(
            self.config.seed,
            step,
            np.repeat(np.arange(count, dtype=np.uint32), group),
            np.repeat(hashes, group),
            np.tile(np.arange(group, dtype=np.uint32), count),
        )
        return hosts.to_global(keys, self._rows)

    def window_starts(self, batch: PromptBatch, step: int) -> jax.Array:
        """Where the window of trained steps starts, int32 [P·G]; the same within a group."""
        hashes = np.array([noise.prompt_hash(i) for i in batch.ids], np.uint32)
        starts = step_plan.window_starts(self.plan.steps, self.config, step, hashes)
        return hosts.to_global(np.repeat(starts, self.config.rollout.group_size), self._rows)

    def sample(self, params: Any, batch: PromptBatch, keys: jax.Array) -> jax.Array:
        """Clean latents of the evaluation sampler (ODE); float32 [B, t, h, w, C]."""
        condition = self.condition(batch)
        keys = hosts.to_global(keys, self._rows)
        return self.programs.sample(params, condition, self.frozen, keys)

    def score(
        self, latents: jax.Array, samples: PromptBatch, name: str, timer: PhaseTimer
    ) -> Scores:
        """Decodes piece by piece and scores each while the next one decodes.

        Args:
          latents: clean latents [B, t, h, w, C].
          samples: their B prompts.
          name: start of the request ids.
          timer: gets the phases `decode` and `reward`.
        """
        size = plan_lib.decode_batch(self.config, self._mesh)
        count = latents.shape[0] // size
        pending: dict[int, futures.Future] = {}
        for piece in range(count):
            with timer("decode"):
                frames = self._decode(latents, piece, size)
            for row, video in frames:
                b = piece + count * row
                pending[b] = self._submit(video, samples, b, name)
            self._check_interrupt()
        with timer("reward"):
            return self._collect(pending, len(samples.ids))

    def score_videos(self, videos: np.ndarray, samples: PromptBatch, name: str) -> Scores:
        """Scores frames that every process has; uint8 [B, F, H, W, 3]. Each takes its share."""
        share = range(jax.process_index(), len(videos), jax.process_count())
        return self._collect(
            {b: self._submit(videos[b], samples, b, name) for b in share}, len(videos)
        )

    def decode(self, latents: jax.Array) -> np.ndarray:
        """All frames of a batch on every process; uint8 [B, F, H, W, 3]."""
        size = plan_lib.decode_batch(self.config, self._mesh)
        count = latents.shape[0] // size
        pieces = [
            hosts.to_host(self.programs.decode(self._vae_params, latents, p, size=size))
            for p in range(count)
        ]
        return np.stack(pieces, 1).reshape(latents.shape[0], *pieces[0].shape[1:])

    def _decode(self, latents: jax.Array, piece: int, size: int) -> list[tuple[int, np.ndarray]]:
        """The frames of a piece that this process owns."""
        frames = self.programs.decode(self._vae_params, latents, piece, size=size)
        return list(hosts.local_rows(frames))

    def _submit(
        self, video: np.ndarray, samples: PromptBatch, b: int, name: str
    ) -> futures.Future[reward_types.RewardResult]:
        request_id = f"{name}/{samples.ids[b]}/{b}"
        return self._scorer.submit(video, samples.prompts[b], request_id, self.config.video.fps)

    def _collect(self, pending: dict[int, futures.Future], count: int) -> Scores:
        """Waits for the answers of this process, then joins those of all processes."""
        names = tuple(dataclasses.asdict(self.config.rewards.weights))
        # The last column tells all processes of a changed reward model.
        table = np.full((count, len(names) + 1), np.nan, np.float32)
        table[:, -1] = 0
        owned = np.zeros(count, bool)
        for b, future in pending.items():
            while not futures.wait([future], timeout=0.5).done:
                self._check_interrupt()
            result = future.result()
            owned[b] = True
            if result.ok:
                table[b, :-1] = [result.scores[name] for name in names]
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
        valid = np.isfinite(table).all(axis=1)
        table[~valid] = np.nan
        return Scores({n: table[:, i] for i, n in enumerate(names)}, valid)

    def advantages(self, scores: Scores) -> tuple[np.ndarray, dict[str, float]]:
        """Group-normalised advantages [B] and the reward metrics."""
        config = self.config
        shape = (-1, config.rollout.group_size)
        weighted = scores.weighted(dataclasses.asdict(config.rewards.weights))
        grouped = jnp.asarray(weighted.reshape(shape)), jnp.asarray(scores.valid.reshape(shape))
        advantages = advantage.group_advantages(
            *grouped,
            config.advantage.epsilon,
            config.advantage.clip,
            std_floor=config.advantage.std_floor,
            std=config.advantage.std,
        )
        advantages = np.asarray(advantages).reshape(-1)
        metrics = reward_metrics(scores, dataclasses.asdict(config.rewards.weights))
        metrics["reward/group_std"] = float(advantage.group_std(*grouped))
        metrics["advantage/nonzero_fraction"] = float(np.mean(advantages != 0))
        return advantages, metrics

    def _enough(self, scores: Scores) -> bool:
        """Whether enough samples have a reward for an update; the same on every process."""
        fraction = float(np.mean(scores.valid))
        if fraction >= self.config.rewards.min_valid_fraction:
            return True
        logging.warning(
            "update skipped: only %.0f %% of the samples have a reward (at least %.0f %% needed)",
            100 * fraction,
            100 * self.config.rewards.min_valid_fraction,
        )
        return False

    def update(
        self, state: state_lib.LearnerState, batch: update_lib.UpdateBatch
    ) -> tuple[state_lib.LearnerState, dict[str, float]]:
        """`updates_per_rollout` updates; the first one passes the gate of `ratio.check`.

        Raises:
          NumericsError: see there.
        """
        limits = ratio_lib.tolerances(self.config)
        old, metrics = self.programs.no_means(), {}
        for index in range(self.config.loss.updates_per_rollout):
            state, values, old = self.programs.update(state, batch, self.frozen, limits, old)
            # With several updates the metrics of the last one tell how far the policy has gone.
            metrics = self._floats(values)
            if index == 0 and not self.plan.is_forward:
                ratio_lib.check(self.config, metrics)
            for name in ("loss", "gradient", "params"):
                if not metrics[f"update/finite_{name}"]:
                    logging.warning("update skipped: the %s is not finite", name)
            self._warn_about_epsilon(metrics)
        return state, _public(metrics)

    def _floats(self, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """Plain numbers; a metric [T] becomes one of each step that may be trained."""
        values = {}
        for name, value in jax.device_get(dict(metrics)).items():
            if np.ndim(value) == 0:
                values[name] = float(value)
            else:
                steps = np.flatnonzero(self.plan.trained)
                values |= {f"{name}_{t:02d}": float(value[t]) for t in steps}
        return values

    def _warn_about_epsilon(self, values: dict[str, float]) -> None:
        eps = self.config.optimizer.eps
        text = optimizers.warn_about_epsilon(values["grad/rms_over_eps"], eps)
        if text is not None:
            logging.log_every_n(logging.WARNING, "%s", 50, text)

    def condition(self, batch: PromptBatch, place: jax.sharding.Sharding | None = None) -> Any:
        """The condition of B samples, divided over the mesh; B must divide."""
        place = self._rows if place is None else place
        latent_frames = self.plan.latent_shape[0]
        return conditions.to_condition(batch, place, self.plan.transformer, latent_frames)


def reward_metrics(scores: Scores, weights: Mapping[str, float]) -> dict[str, float]:
    """Means over the valid samples: `reward/overall` is the plain sum, `weighted` the objective."""
    valid = scores.valid

    def mean(values: np.ndarray) -> float:
        return float(np.mean(values[valid], dtype=np.float64)) if valid.any() else float("nan")

    return {
        "reward/overall": mean(scores.weighted(dict.fromkeys(scores.values, 1.0))),
        "reward/weighted": mean(scores.weighted(weights)),
        **{f"reward/{name.lower()}": mean(values) for name, values in scores.values.items()},
        "reward/valid_fraction": float(np.mean(valid)),
    }


def _public(values: dict[str, float]) -> dict[str, float]:
    """The metrics without the flags that only the learner looks at."""
    internal = ("update/finite_", "update/ratio_in_tolerance")
    return {name: value for name, value in values.items() if not name.startswith(internal)}
