"""One step of SAGE-GRPO: rollout -> decode -> rewards -> advantages -> update."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from sage_grpo_jax.common.phases import PhaseTimer
from sage_grpo_jax.config import step_plan
from sage_grpo_jax.flow import noise
from sage_grpo_jax.grpo import advantage
from sage_grpo_jax.parallel import hosts, sharding
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy.conditions import PromptBatch
from sage_grpo_jax.training import micro_losses, optimizers
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import scoring as scoring_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib


class Check(Protocol):
    """What looks at an update before it is made, as `checks.shadow.Shadow` does."""

    def __call__(
        self,
        state: state_lib.LearnerState,
        batch: update_lib.UpdateBatch,
        frozen: micro_losses.Frozen,
    ) -> dict[str, float]:
        """Metrics of its own; it leaves what it is given as it is."""
        ...


class Learner:
    """The algorithm around the compiled programs; holds no trained state itself.

    Args:
      programs: of `training.programs.build`.
      vae_params: on the programs' mesh.
      negative: the one unconditional prompt of guidance.
      scorer: scores videos.
      check_interrupt: called between phases; raises to abandon the step.
      base: with LoRA the frozen weights, on the mesh; None for full fine-tuning.
      check: looks at every update before it is made, and adds metrics of its own.
    """

    def __init__(
        self,
        programs: programs_lib.Programs,
        vae_params: Any,
        negative: PromptBatch,
        scorer: scoring_lib.Scorer,
        check_interrupt: Callable[[], None] = lambda: None,
        base: Any = None,
        check: Check | None = None,
    ) -> None:
        self.programs = programs
        self.plan = programs.plan
        self.config = programs.plan.config
        self.scoring = scoring_lib.Scoring(programs, vae_params, scorer, check_interrupt)

        self._check_interrupt = check_interrupt
        self._check = check
        self._gate = ratio_lib.Gate.of(self.config)
        self._rows = sharding.batch_sharding(programs.mesh)

        # One unconditional prompt on every device: guidance repeats it to the size of a batch.
        whole = sharding.replicated(programs.mesh)
        self.frozen = micro_losses.Frozen(self.condition(negative, whole), base)

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
          RewardModelChangedError: see there; nothing was applied.
        """
        # The number comes from the state, so that a resumed run draws the noise and the windows
        # that the run before would have drawn.
        timer, number = PhaseTimer(), int(state.step)

        # Rollout: G samples of each prompt, with noise that belongs to seed, step and sample.
        samples = batch.repeat(self.config.rollout.group_size)
        keys = self.sample_keys(batch, number)
        starts = self.window_starts(batch, number)
        condition = self.condition(samples)
        with timer("rollout"):
            trajectory = self.programs.rollout(state.sampled, condition, self.frozen, keys, starts)
            # Dispatch returns at once; without the wait these seconds would count as decoding.
            jax.block_until_ready(trajectory)
        self._check_interrupt()

        # Decode and rewards: a piece is scored while the next one is decoded.
        latents = trajectory.latents[-1]
        scores = self.scoring.decode_and_score(latents, samples, f"step{number}", timer)

        # Advantages: how much better a sample is than the others of its prompt.
        advantages, reward_metrics = self.advantages(scores)
        self._check_interrupt()

        # Update: on all valid samples, or not at all where too few have a reward.
        update_batch = update_lib.UpdateBatch(
            trajectory.latents,
            keys,
            condition,
            hosts.to_global(advantages, self._rows),
            hosts.to_global(scores.valid, self._rows),
            starts,
        )

        # The scores are equal on every process, and so is this decision: a process that skipped the
        # update alone would leave the others waiting in it.
        if self._enough(scores):
            # Before the update, which gives the buffers of the state away.
            checks = self._check(state, update_batch, self.frozen) if self._check else {}
            with timer("update"):
                state, metrics = self.update(state, update_batch)
            metrics |= checks
        else:
            metrics = {"update/applied": 0.0}

        # A step counts whether its update was applied or not: the next one has other noise.
        state = state._replace(step=state.step + 1)
        return state, {**reward_metrics, **metrics, **timer.finish()}

    def sample_keys(self, batch: PromptBatch, step: int) -> jax.Array:
        """One key per sample, [P·G]: a function of seed, step, slot, prompt and sample alone."""
        group = self.config.rollout.group_size
        count = len(batch.ids)
        hashes = np.array([noise.prompt_hash(i) for i in batch.ids], np.uint32)
        # The samples of a prompt lie next to each other: [P, G] read row by row. Because of the
        # slot a prompt that is there twice has other noise the second time.
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

    def advantages(self, scores: scoring_lib.Scores) -> tuple[np.ndarray, dict[str, float]]:
        """Group-normalised advantages [B] and the reward metrics."""
        settings, rewards = self.config.advantage, self.config.rewards

        # [B] -> [P, G]: the samples of a prompt lie next to each other.
        def grouped(values: np.ndarray) -> np.ndarray:
            return values.reshape(-1, self.config.rollout.group_size)

        valid = grouped(scores.valid)
        advantages = advantage.combined_advantages(
            {name: grouped(values) for name, values in scores.values.items()},
            rewards.weights,
            valid,
            settings.epsilon,
            settings.clip,
            std_floor=settings.std_floor,
            std=settings.std,
            combine=settings.combine,
        )
        advantages = np.asarray(advantages).reshape(-1)

        metrics = scoring_lib.reward_metrics(scores, rewards)
        spread = advantage.group_std(grouped(scores.weighted(rewards.weights)), valid)
        metrics["reward/group_std"] = float(spread)
        metrics["advantage/nonzero_fraction"] = float(np.mean(advantages != 0))
        return advantages, metrics

    def _enough(self, scores: scoring_lib.Scores) -> bool:
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
        """`updates_per_rollout` updates; the first one passes the gate of `ratio.Gate`.

        Raises:
          NumericsError: see there.
        """
        old, metrics, limits = self.programs.no_means(), {}, self._gate.limits
        for index in range(self.config.loss.updates_per_rollout):
            # State and old means are donated: what went in cannot be read again.
            state, values, old = self.programs.update(state, batch, self.frozen, limits, old)
            # With several updates the metrics of the last one tell how far the policy has gone.
            metrics = self._floats(values)
            if index == 0 and not self.plan.is_forward:
                # Later updates have moved away from the policy that sampled, as they should. The
                # program has refused a bad first one already: raising loses nothing.
                self._gate.check(metrics)

            for name in ("loss", "gradient", "params"):
                if not metrics[f"update/finite_{name}"]:
                    logging.warning("update skipped: the %s is not finite", name)
            self._warn_about_epsilon(metrics)
        return state, _public(metrics)

    def _floats(self, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """Plain numbers; a metric [T] becomes one of each step that may be trained."""
        values = {}
        # One transfer brings all of them; one for each number would wait for the device each time.
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


def _public(values: dict[str, float]) -> dict[str, float]:
    """The metrics without the flags that only the learner looks at."""
    internal = ("update/finite_", "update/ratio_in_tolerance")
    return {name: value for name, value in values.items() if not name.startswith(internal)}
