"""NaN wherever it may come from: named, contained, never in the parameters of a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.rewards import types as reward_types
from sage_grpo_jax.training import checkpoint, loop, ratio
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import update as update_lib


def _poison(array):
    """The array with a NaN as its first number."""
    return array.at[(0,) * array.ndim].set(jnp.nan)


def _poison_first(tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [_poison(leaves[0]), *leaves[1:]])


def _poison_region(state, name):
    """NaN in the trust region's memory of parameters."""
    *others, region = state.opt_state
    return state._replace(
        opt_state=(*others, region._replace(**{name: _poison_first(getattr(region, name))}))
    )


def _poison_moments(state):
    def poison(path, leaf):
        is_moment = any(getattr(key, "name", None) == "mu" for key in path)
        return _poison(leaf) if is_moment and leaf.ndim else leaf

    return state._replace(opt_state=jax.tree_util.tree_map_with_path(poison, state.opt_state))


@pytest.fixture
def before_step(monkeypatch):
    """before_step(n, function): the state passes through the function before step n (from 0)."""

    def install(number, function):
        original = learner_lib.Learner.step

        def step(self, state, batch):
            state = function(state) if int(state.step) == number else state
            return original(self, state, batch)

        monkeypatch.setattr(learner_lib.Learner, "step", step)

    return install


def _params(runs):
    return [np.asarray(x) for x in jax.tree.leaves(runs.state.params)]


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (lambda s: _poison_region(s, "anchor"), "kl/anchor was not finite"),
        pytest.param(
            lambda s: _poison_region(s, "previous"),
            "kl/previous was not finite",
            marks=pytest.mark.slow,
        ),
        pytest.param(_poison_moments, "the new parameters were not finite", marks=pytest.mark.slow),
    ],
)
def test_a_broken_reference_or_moment_never_reaches_the_parameters(
    runs, tmp_path, before_step, poison, reason
):
    runs.train(tmp_path / "good", num_steps=1)
    good = _params(runs)
    before_step(1, poison)
    with pytest.raises(loop.TooManySkipsError, match=f"the last one because {reason}"):
        runs.train(tmp_path / "bad", **{"rewards.max_skipped_updates": 2})
    for a, b in zip(good, _params(runs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["update/applied"] for row in runs.result(tmp_path / "bad").rows[1:]] == [1, 0, 0]


def _break_update(monkeypatch, gradients):
    """The real guard around `gradients`, which takes the place of the backward pass."""
    original = programs_lib.build

    def build(blueprint):
        programs = original(blueprint)
        update = update_lib.make_update(blueprint.plan, blueprint.optimizer)
        update = jax.jit(update)
        return dataclasses.replace(programs, update=update)

    monkeypatch.setattr(programs_lib, "build", build)
    monkeypatch.setattr(update_lib, "_gradients", gradients)


def test_a_gradient_that_is_not_finite_is_named(runs, tmp_path, monkeypatch, caplog):
    def gradients(plan, state, batch, frozen, old):
        grads = jax.tree.map(jnp.zeros_like, state.params)
        leaves, structure = jax.tree.flatten(grads)
        leaves[3] = leaves[3].at[(0,) * leaves[3].ndim].set(jnp.nan)
        names = ("loss/policy", "loss/total", "kl/anchor", "kl/previous", "kl/total")
        metrics = {
            name: jnp.zeros(()) for name in (*names, "ratio/max_deviation", "ratio/rollout_shift")
        }
        return jax.tree.unflatten(structure, leaves), metrics, jnp.ones(()), old

    _break_update(monkeypatch, gradients)
    with pytest.raises(loop.TooManySkipsError, match="because grad/norm was not finite"):
        runs.train(tmp_path, **{"rewards.max_skipped_updates": 1})
    assert "update skipped: the gradient is not finite" in caplog.text
    assert all(np.isfinite(x).all() for x in _params(runs))


def _break_rollouts(monkeypatch, change):
    """Every rollout of a step passes through `change`."""
    original = programs_lib.build

    def build(*args):
        programs = original(*args)

        def rollout(*inputs):
            trajectory = programs.rollout(*inputs)
            return trajectory._replace(latents=change(trajectory.latents))

        return dataclasses.replace(programs, rollout=rollout)

    monkeypatch.setattr(programs_lib, "build", build)


def test_a_sample_that_ends_in_nan_is_masked(runs, tmp_path, monkeypatch, caplog):
    _break_rollouts(monkeypatch, lambda latents: latents.at[-1, 1, 0].set(jnp.nan))
    assert runs.train(tmp_path, num_steps=2)["steps"] == 2
    rows = runs.result(tmp_path).rows[1:]
    assert [row["reward/valid_fraction"] for row in rows] == [0.75, 0.75]
    assert [row["update/applied"] for row in rows] == [1, 1]
    assert "the rollout made 1 samples that are not finite" in caplog.text
    assert all(np.isfinite(x).all() for x in _params(runs))


def test_a_model_that_breaks_in_the_update_stops_the_run_and_keeps_the_checkpoint(
    runs, tmp_path, monkeypatch, straight
):
    runs.train(tmp_path, num_steps=2, **{"checkpoint.every": 2})
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / checkpoint.FOLDER).rglob("*")}
    with monkeypatch.context() as patch:
        _break_rollouts(patch, lambda latents: latents.at[1, 1, 0].set(jnp.nan))
        with pytest.raises(ratio.NumericsError, match="the model's output is not finite"):
            runs.train(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / checkpoint.FOLDER).rglob("*")} == kept
    assert runs.train(tmp_path)["steps"] == 3
    for a, b in zip(runs.result(tmp_path).arrays, straight.arrays, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reward_that_is_not_finite_is_masked_whoever_let_it_through(runs, tmp_path):
    class Careless(type(runs.scorer)):
        def submit(self, video, prompt, request_id, fps):
            future = super().submit(video, prompt, request_id, fps)
            if request_id.startswith("step") and request_id.endswith("/3"):
                result = future.result()
                scores = {**result.scores, "MQ": float("inf")}
                future = type(future)()
                future.set_result(reward_types.RewardResult(True, reward_types.OK, scores=scores))
            return future

    runs.scorer = Careless()
    runs.train(tmp_path, num_steps=1)
    row = runs.result(tmp_path).rows[1]
    assert row["reward/valid_fraction"] == 0.75
    assert np.isfinite(row["reward/mq"])
    assert row["update/applied"] == 1
