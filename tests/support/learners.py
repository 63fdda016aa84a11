"""A learner with its first state and its prompts, put together as a run does it."""

import pathlib
from typing import Any, NamedTuple

import jax

from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import setup
from sage_grpo_jax.training import state as state_lib


class Parts(NamedTuple):
    """What the tests of a step need."""

    learner: learner_lib.Learner
    state: state_lib.LearnerState
    prompts: setup.Prompts


def make(
    config: config_lib.Config,
    scorer: Any,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
    build_programs=setup.build_programs,
) -> Parts:
    """The parts of a config, on a mesh that is set; `folder` gets the embeddings."""
    networks = setup.read_networks(config.model)
    prompts = setup.open_prompts(config, folder, networks)
    learner = learner_lib.Learner(
        build_programs(networks, config, mesh),
        setup.load_vae(networks, mesh),
        prompts.negative,
        scorer,
        mesh,
        base=setup.load_base(networks, config, mesh),
    )
    return Parts(learner, setup.fresh_state(networks, config, mesh), prompts)
