"""How the update cuts a rollout into micro-batches; its gradient is in whole_update_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import update
from sage_grpo_jax.training.blueprint import Blueprint

SAMPLES = 16  # of the tiny recipe
SIZE = 8


@pytest.fixture
def make_plan(make_config, one_device):
    def make(overrides=None):
        config = make_config({"loss.micro_batch": SIZE, **(overrides or {})})
        return Blueprint.read(config, one_device).plan

    return make


def rollout_of(plan, starts=0, valid=True):
    """An `UpdateBatch` whose latents say 100·(steps taken) + sample."""
    numbers = np.arange(SAMPLES, dtype=np.float32)
    taken = 100 * np.arange(plan.config.rollout.num_steps + 1, dtype=np.float32)
    values = (taken[:, None] + numbers)[..., None]
    size = int(np.prod(plan.latent_shape))
    return update.UpdateBatch(
        jnp.asarray(np.broadcast_to(values, (*values.shape[:2], size))),
        jax.random.split(jax.random.key(0), SAMPLES),
        {"text": jnp.asarray(numbers)[:, None] + jnp.zeros(3)},
        jnp.asarray(-numbers),
        jnp.broadcast_to(jnp.asarray(valid), SAMPLES),
        jnp.broadcast_to(jnp.asarray(starts, jnp.int32), SAMPLES),
    )


def test_pieces_take_every_sample_once():
    pieces = np.asarray(update.split_batch(jnp.arange(SAMPLES), SIZE))
    assert pieces.shape == (SAMPLES // SIZE, SIZE)
    for sample in range(SAMPLES):
        assert pieces[sample % 2, sample // 2] == sample


def test_pieces_move_nothing_between_devices():
    mesh = mesh_lib.make_mesh(4, 2, 1)
    rows = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        split = jax.jit(
            lambda x: update.split_batch(x, SIZE),
            in_shardings=rows,
            out_shardings=sharding.batch_sharding(mesh, 1),
        )
        text = split.lower(jax.ShapeDtypeStruct((SAMPLES, 5), jnp.float32)).compile().as_text()
    for moved in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert moved not in text


@pytest.mark.parametrize("piece", [0, 1])
@pytest.mark.parametrize("position", [0, 2])
def test_a_micro_batch_holds_the_states_around_its_step(make_plan, position, piece):
    plan = make_plan()
    micro = update.take_micro_batch(plan, rollout_of(plan), position, piece)
    step = np.flatnonzero(plan.trained)[position]
    samples = np.arange(piece, SAMPLES, SAMPLES // SIZE)
    assert micro.step == step
    np.testing.assert_array_equal(micro.latents[:, 0, 0, 0, 0], 100 * step + samples)
    np.testing.assert_array_equal(micro.next_latents[:, 0, 0, 0, 0], 100 * (step + 1) + samples)
    np.testing.assert_array_equal(micro.advantages, -samples)
    np.testing.assert_array_equal(micro.condition["text"][:, 0], samples)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), SAMPLES))
    np.testing.assert_array_equal(jax.random.key_data(micro.keys), keys[samples])


def test_samples_in_different_windows_have_their_own_steps(make_plan):
    plan = make_plan(
        {"rollout.num_steps": 6, "rollout.window": "random_k", "rollout.window_size": 2}
    )
    starts = np.arange(SAMPLES) % 3
    micro = update.take_micro_batch(plan, rollout_of(plan, starts), 1, 1)
    samples = np.arange(1, SAMPLES, 2)
    steps = np.flatnonzero(plan.steps.counted)[starts[samples] + 1]
    np.testing.assert_array_equal(micro.step, steps)
    np.testing.assert_array_equal(micro.latents[:, 0, 0, 0, 0], 100 * steps + samples)
    np.testing.assert_array_equal(micro.next_latents[:, 0, 0, 0, 0], 100 * (steps + 1) + samples)


def test_what_is_masked_is_finite_and_does_not_count(make_plan):
    plan, valid = make_plan(), np.arange(SAMPLES) % 3 != 0
    batch = rollout_of(plan, valid=valid)
    batch = batch._replace(latents=batch.latents.at[:, ~valid].set(jnp.nan))
    micro = update.take_micro_batch(plan, batch, 0, 0)
    kept = valid[::2]
    np.testing.assert_array_equal(micro.counts, kept)
    for states in (micro.latents, micro.next_latents):
        np.testing.assert_array_equal(np.asarray(states)[~kept], 0)
        assert (np.asarray(states)[kept][1:] != 0).all()


def test_one_value_that_is_not_finite_is_found():
    tree = {"a": jnp.ones(3), "b": [jnp.ones((2, 2)), jnp.zeros(())]}
    assert update.all_finite(tree)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not update.all_finite({**tree, "b": [jnp.ones((2, 2)).at[1, 0].set(bad)]})
