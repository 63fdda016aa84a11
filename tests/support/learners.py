"""A learner with its first state and its prompts, put together as a run does it."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from sage_grpo_jax.checks import shadow
from sage_grpo_jax.config import schema
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.blueprint import Blueprint


@dataclasses.dataclass
class Trainer:
    """What the tests of a step need."""

    learner: learner_lib.Learner
    state: state_lib.LearnerState
    prompts: prompts_lib.Prompts

    def steps(self, count: int) -> list[dict[str, float]]:
        """Takes `count` steps."""
        batches, metrics = iter(self.prompts), []
        for _ in range(count):
            self.state, values = self.learner.step(self.state, next(batches))
            metrics.append(values)
        return metrics

    def params(self):
        """The parameters as numpy."""
        return jax.tree.map(np.asarray, self.state.params)

    def rollout(self, batch: conditions.PromptBatch, params: Any = None, step: int = 0):
        """The `Trajectory` of a step; of the trainer's own parameters by default."""
        learner = self.learner
        return learner.programs.rollout(
            self.state.params if params is None else params,
            learner.condition(batch.repeat(learner.config.rollout.group_size)),
            learner.frozen,
            learner.sample_keys(batch, step),
            learner.window_starts(batch, step),
        )

    def update_batch(
        self,
        batch: conditions.PromptBatch,
        latents: Any,
        advantages: np.ndarray | None = None,
        valid: np.ndarray | None = None,
        step: int = 0,
    ) -> update_lib.UpdateBatch:
        """A rollout as the update sees it; by default with random advantages, all valid."""
        learner = self.learner
        keys = learner.sample_keys(batch, step)
        if advantages is None:
            advantages = np.random.default_rng(0).standard_normal(keys.shape[0])
        return update_lib.UpdateBatch(
            latents,
            keys,
            learner.condition(batch.repeat(learner.config.rollout.group_size)),
            np.asarray(advantages, np.float32),
            np.ones(keys.shape[0], bool) if valid is None else valid,
            learner.window_starts(batch, step),
        )


# Compiled programs by config and devices; what only the host looks at does not compile anew.
_PROGRAMS: dict[tuple, programs_lib.Programs] = {}


def compiled(blueprint: Blueprint) -> programs_lib.Programs:
    """The programs of a config, compiled once for all tests."""
    config = blueprint.config
    updates = config.loss.updates_per_rollout
    if not (config.loss.split_updates or config.loss.objective == "nft"):
        # One program serves all updates of a rollout, however many: 1 and more than 1 differ.
        updates = min(updates, 2)
    loss = dataclasses.replace(
        config.loss,
        ratio_tolerance=0.0,
        rollout_tolerance=0.0,
        ratio_action="stop",
        updates_per_rollout=updates,
    )
    key = (dataclasses.replace(config, loss=loss), blueprint.mesh)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = programs_lib.build(blueprint)
    return dataclasses.replace(_PROGRAMS[key], blueprint=blueprint)


def make(
    config: schema.Config,
    scorer: Any,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
    build_programs=programs_lib.build,
) -> Trainer:
    """The trainer of a config, on a mesh that is set; `folder` gets the embeddings."""
    blueprint = Blueprint.read(config, mesh)
    prompts = prompts_lib.open_prompts(config, folder, blueprint.networks)
    programs = build_programs(blueprint)
    learner = learner_lib.Learner(
        programs,
        blueprint.load_vae(),
        prompts.negative,
        scorer,
        base=blueprint.load_base(),
        check=shadow.Shadow(programs.plan) if config.debug.shadow else None,
    )
    return Trainer(learner, blueprint.fresh_state(), prompts)
