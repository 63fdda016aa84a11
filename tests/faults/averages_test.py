"""Runs that keep moving averages: the same bits after a stop, and who gets the average."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from sage_grpo_jax.config import methods
from sage_grpo_jax.sampling import sources
from sage_grpo_jax.training import checkpoint, evaluation
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training.blueprint import Blueprint

# The policy that samples lags behind from the second update on, so the two differ.
NFT = {
    **methods.METHODS["diffusion_nft"],
    "nft.decay_rate": 0.25,
    "optimizer.learning_rate": 0.05,
    "num_steps": 4,
    "eval.every": 3,
}
OVERRIDES = {name.replace(".", "__"): value for name, value in NFT.items()}
OVERRIDES["data__test_prompts"] = ""


@pytest.fixture
def seen(runs, monkeypatch):
    """What was evaluated and sampled, by the run that ran last."""
    record = {"evaluated": [], "sampled": []}
    evaluate, step = evaluation.evaluate, learner_lib.Learner.step

    def watched_evaluate(learner, params, *rest):
        record["evaluated"].append(jax.tree.map(np.asarray, params))
        return evaluate(learner, params, *rest)

    def watched_step(learner, state, batch):
        before = jax.tree.map(np.asarray, (state.params, state.sampling))
        rollout = learner.programs.rollout

        def watched_rollout(params, *rest):
            record["sampled"].append((*before, jax.tree.map(np.asarray, params)))
            return rollout(params, *rest)

        programs = learner.programs
        learner.programs = dataclasses.replace(programs, rollout=watched_rollout)
        try:
            return step(learner, state, batch)
        finally:
            learner.programs = programs

    monkeypatch.setattr(evaluation, "evaluate", watched_evaluate)
    monkeypatch.setattr(learner_lib.Learner, "step", watched_step)
    return record


def same(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_stopped_run_ends_with_the_same_bits(runs, seen, tmp_path, monkeypatch):
    runs.train(tmp_path / "straight", **OVERRIDES)
    expected, state = runs.result(tmp_path / "straight"), runs.state
    assert [row["step"] for row in expected.rows] == [0, 1, 2, 3, 4]
    assert all(np.isfinite(row["nft/sampling_distance"]) for row in expected.rows[1:])
    assert expected.rows[4]["nft/sampling_distance"] > 0
    assert not any(name.startswith("ratio/") for row in expected.rows for name in row)
    assert expected.rows[2]["reward/group_std"] >= 0

    # Evaluations are those of the average: at the start, after 3 steps and after 4.
    assert len(seen["evaluated"]) == 3
    assert same(seen["evaluated"][-1], state.ema)
    assert not same(state.ema, state.params)
    # Rollouts are those of the policy that samples.
    assert len(seen["sampled"]) == 4
    for params, sampling, used in seen["sampled"]:
        assert same(used, sampling)
        assert params.keys() == used.keys()
    assert not same(seen["sampled"][-1][0], seen["sampled"][-1][2])

    update, calls = learner_lib.Learner.update, []

    def interrupted(learner, *rest):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(learner, *rest)

    monkeypatch.setattr(learner_lib.Learner, "update", interrupted)
    assert runs.train(tmp_path / "broken", **OVERRIDES) is None
    assert 1 <= int(runs.state.step) < 4
    runs.train(tmp_path / "broken", **OVERRIDES)
    runs.assert_same(tmp_path / "broken", expected)

    # The average of the checkpoint, for who asks for it.
    config = runs.config(**OVERRIDES)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "context"), devices=jax.devices()[:1])
    abstract = Blueprint.read(config, mesh).state.params
    workdir = tmp_path / "broken"
    assert same(checkpoint.restore_params(workdir, abstract, ema=True), state.ema)
    assert same(checkpoint.restore_params(workdir, abstract), state.params)
    for wanted, ema in ((state.ema, True), (state.params, False)):
        source = sources.Source(checkpoint=str(workdir), ema=ema)
        blueprint = Blueprint.read(sources.adapt_config(config, source), mesh)
        loaded = sources.load(blueprint, source)
        assert same(loaded.params, wanted)
        assert sources.describe(blueprint.networks, source).get("ema", False) == ema


def test_a_run_without_an_average_says_so(runs, seen, tmp_path):
    plain = {**OVERRIDES, "ema__decay": 0.0, "eval__weights": "trained", "num_steps": 1}
    runs.train(tmp_path / "run", **plain)
    assert same(seen["evaluated"][-1], runs.state.params)
    config = runs.config(**plain)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "context"), devices=jax.devices()[:1])
    abstract = Blueprint.read(config, mesh).state.params
    with pytest.raises(ValueError, match=r"keeps no moving average .* config\.ema\.decay above 0"):
        checkpoint.restore_params(tmp_path / "run", abstract, ema=True)
    with pytest.raises(ValueError, match="--ema: without --checkpoint there is no average"):
        sources.adapt_config(config, sources.Source(ema=True))
