import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sage_grpo_jax.flow import noise

SHAPE = (2, 3, 5)


@jax.jit
def draw(keys, t_B):
    return noise.initial_noise(keys, SHAPE), noise.step_noise(keys, t_B, SHAPE)


def make_keys(batch=8, seed=3, step=7, slot=0):
    hashes = np.array([noise.prompt_hash(f"prompt {b // 4}") for b in range(batch)])
    return noise.sample_keys(seed, step, slot, hashes, np.arange(batch) % 4)


def test_prompt_hash_is_the_head_of_sha256():
    want = int(hashlib.sha256(b"a red disk").hexdigest()[:8], 16)
    assert noise.prompt_hash("a red disk") == want
    assert noise.prompt_hash("a red disk").dtype == np.uint32


def test_keys_follow_the_documented_counters():
    keys = make_keys()
    key = jax.random.key(3, impl="threefry2x32")
    for counter in (7, 0, int(noise.prompt_hash("prompt 1")), 2):
        key = jax.random.fold_in(key, counter)
    np.testing.assert_array_equal(jax.random.key_data(keys[6]), jax.random.key_data(key))


def test_streams_keep_their_numbers():
    """Golden: a run that goes on with another version must find the noise that it had."""
    keys = noise.sample_keys(3, 7, 0, np.full(2, 12345, np.uint32), np.arange(2))
    found = [
        noise.initial_noise(keys, (3,)),
        noise.step_noise(keys, 1, (3,)),
        noise.forward_noise(keys, 1, (3,)),
    ]
    wanted = [
        [[-0.6096, -1.6320, 0.5567], [-0.5733, -0.0620, 1.1325]],
        [[0.5034, -0.3027, -0.4095], [-0.7985, -1.0256, -0.3810]],
        [[-0.5052, -1.3589, -0.6244], [0.4826, -1.3232, -1.6816]],
    ]
    np.testing.assert_allclose(found, wanted, atol=6e-5)
    assert noise.chosen_steps(keys, 20, 4).tolist() == [[2, 13, 15, 18], [4, 6, 12, 19]]
    prompts = np.full(4, 12345, np.uint32)
    starts = noise.window_starts(3, 7, np.arange(4, dtype=np.uint32), prompts, 50)
    assert starts.tolist() == [10, 48, 40, 28]
    assert jax.random.key_data(noise.adapter_key(3)).tolist() == [1024511538, 2603795180]


def test_every_counter_changes_every_draw():
    def draws(**kwargs):
        keys = make_keys(**kwargs)
        initial, first = draw(keys, np.zeros(8, int))
        _, second = draw(keys, np.ones(8, int))
        return [initial, first, second]

    everything = np.stack([*draws(), *draws(seed=4), *draws(step=8), *draws(slot=1)])
    flat = everything.reshape(-1, np.prod(SHAPE))
    assert len(np.unique(flat[:, 0])) == len(flat)
    correlations = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlations).max() < 0.8  # 30 numbers each


def test_draws_are_standard_normal():
    values = np.asarray(noise.step_noise(make_keys(4), 0, (5000,)))
    for row in values:
        assert scipy.stats.kstest(row, "norm").pvalue > 1e-3


def test_same_bits_for_any_batch_split_and_mix_of_steps():
    keys, t_B = make_keys(), np.array([0, 1, 2, 0, 1, 2, 0, 1])
    whole = draw(keys, t_B)
    parts = [draw(keys[i : i + 2], t_B[i : i + 2]) for i in range(0, 8, 2)]
    for i in range(2):
        np.testing.assert_array_equal(whole[i], np.concatenate([part[i] for part in parts]))
    same_step = noise.step_noise(keys, 2, SHAPE)
    np.testing.assert_array_equal(whole[1][t_B == 2], same_step[t_B == 2])


def test_same_bits_on_eight_devices_without_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    hashes = np.array([noise.prompt_hash(str(b)) for b in range(8)])

    def draw_all(step, hashes, samples):
        keys = noise.sample_keys(0, step, 0, hashes, samples)
        return noise.initial_noise(keys, SHAPE), noise.step_noise(keys, 5, SHAPE)

    sharding = NamedSharding(mesh, P("data"))
    sharded = jax.jit(draw_all, in_shardings=(None, sharding, sharding), out_shardings=sharding)
    compiled = sharded.lower(jnp.int32(4), hashes, np.arange(8)).compile()
    assert "all-gather" not in compiled.as_text()
    want = jax.jit(draw_all)(jnp.int32(4), hashes, np.arange(8))
    got = sharded(jnp.int32(4), hashes, np.arange(8))
    assert len(got[0].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_adapters_have_a_key_of_their_own():
    key = jax.random.fold_in(jax.random.key(9, impl="threefry2x32"), 2)
    found = jax.random.key_data(noise.adapter_key(9))
    np.testing.assert_array_equal(found, jax.random.key_data(key))


def test_forward_noise_is_a_stream_of_its_own():
    keys, t_B = make_keys(), np.arange(8) % 3
    forward = np.asarray(noise.forward_noise(keys, t_B, (500,)))
    others = [noise.step_noise(keys, t_B, (500,)), noise.initial_noise(keys, (500,))]
    rows = np.concatenate([forward, *map(np.asarray, others)])
    assert np.abs(np.corrcoef(rows) - np.eye(24)).max() < 0.2
    assert scipy.stats.kstest(forward.ravel(), "norm").pvalue > 1e-3
    alone = noise.forward_noise(keys[5:6], 2, (500,))
    np.testing.assert_array_equal(alone[0], forward[5])


def test_chosen_steps_are_subsets_that_are_equally_likely():
    keys = noise.sample_keys(0, 0, 0, np.zeros(3000, np.uint32), np.arange(3000))
    chosen = np.asarray(noise.chosen_steps(keys, 5, 2))
    assert chosen.dtype == np.int32
    assert (np.diff(chosen, axis=1) > 0).all()
    assert chosen.min() == 0
    assert chosen.max() == 4
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) == 10
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_chosen_steps_belong_to_the_sample():
    keys = make_keys()
    whole = np.asarray(noise.chosen_steps(keys, 19, 11))
    parts = [np.asarray(noise.chosen_steps(keys[i : i + 2], 19, 11)) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len(np.unique(whole, axis=0)) == 8
    np.testing.assert_array_equal(noise.chosen_steps(keys[:1], 4, 4), [[0, 1, 2, 3]])
    assert noise.chosen_steps(keys[:3], 4, 0).shape == (3, 0)
    with pytest.raises(ValueError, match="size=5: must be 0 to count=4"):
        noise.chosen_steps(keys, 4, 5)


def test_bad_input():
    with pytest.raises(ValueError, match="typed PRNG keys"):
        noise.initial_noise(jnp.zeros((4, 2), jnp.uint32), SHAPE)
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        noise.sample_keys(0, 0, 0, np.uint32(1), 0)


def test_windows_start_anywhere_and_alike_within_a_group():
    hashes = np.array([noise.prompt_hash(f"p{i}") for i in range(400)], np.uint32)
    slots = np.arange(400, dtype=np.uint32)
    starts = noise.window_starts(3, 7, slots, hashes, 5)
    assert starts.dtype == np.int32
    counts = np.bincount(starts, minlength=5)
    assert len(counts) == 5
    assert counts.min() > 40  # 80 are expected, with a standard deviation of 8
    # Another step moves the windows; the same arguments do not, whatever else is in the batch.
    assert (noise.window_starts(3, 8, slots, hashes, 5) != starts).any()
    np.testing.assert_array_equal(noise.window_starts(3, 7, slots[9:], hashes[9:], 5), starts[9:])
