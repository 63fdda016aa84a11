import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sage_grpo_jax.flow import noise, rollout, schedules, sde

SHAPE = (3, 4, 2)
T = 6


def make_keys(batch):
    return noise.sample_keys(0, 1, 0, np.full(batch, 12345, np.uint32), np.arange(batch))


def velocity_fn(latents, timestep):
    chain = jnp.roll(latents, 1, axis=-1) * 0.5
    return jnp.tanh(chain) - 0.3 * latents + timestep[:, None, None, None] / 1000.0


@functools.partial(jax.jit, static_argnames=("kind", "flat"))
def sample(keys, stochastic, kind="precise", eta=0.5, flat=False):
    schedule = schedules.make_schedule(T, 5.0)
    return rollout.rollout(velocity_fn, keys, SHAPE, schedule, kind, eta, stochastic, flat=flat)


draw_step = jax.jit(noise.step_noise, static_argnames="shape")


def numpy_chain(keys, kind, stochastic, eta=0.5):
    """The same chain as a plain loop over steps in float64."""
    sigmas = np.asarray(schedules.make_schedule(T, 5.0).sigmas, np.float64)
    x = np.asarray(noise.initial_noise(keys, SHAPE), np.float64)
    chain, stds = [x], []
    for t in range(T):
        sigma, sigma_next = sigmas[t], sigmas[t + 1]
        timestep = np.full(len(keys), 1000 * sigma)
        v = np.tanh(np.roll(x, 1, -1) * 0.5) - 0.3 * x + timestep[:, None, None, None] / 1000
        mean, std = x + (sigma_next - sigma) * v, 0.0
        if stochastic[t]:
            removed, std = sde.step_coefficients(kind, sigma, sigma_next, eta, xp=np)
            mean = mean - removed * (x + (1 - sigma) * v)
        x = mean + std * np.asarray(draw_step(keys, t, SHAPE), np.float64)
        chain.append(x)
        stds.append(std)
    return np.stack(chain), np.array(stds)


@pytest.mark.parametrize("kind", ["precise", "cps", "ode"])
def test_equals_a_plain_loop(kind):
    keys = make_keys(4)
    stochastic = np.array([1, 1, 0, 1, 1, 0], bool)
    latents, stds = sample(keys, stochastic, kind)
    assert latents.dtype == stds.dtype == jnp.float32
    assert latents.shape == (T + 1, 4, *SHAPE)
    want_latents, want_stds = numpy_chain(keys, kind, stochastic)
    np.testing.assert_allclose(latents, want_latents, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stds, want_stds, rtol=1e-5)


def test_deterministic_everywhere_is_the_ode_whatever_the_kind():
    keys = make_keys(4)
    never = np.zeros(T, bool)
    ode = sample(keys, np.ones(T, bool), "ode").latents
    for kind in ("precise", "cps"):
        np.testing.assert_allclose(sample(keys, never, kind).latents, ode, rtol=1e-6, atol=1e-6)


def test_point_mass_data_is_hit_exactly_by_the_deterministic_last_step():
    """Data = one point: the velocity is (x - point)/σ, and the last step is clean."""
    point = jnp.arange(24.0).reshape(SHAPE)
    schedule = schedules.make_schedule(20, 5.0)
    stochastic = sde.stochastic_steps("precise", schedule, 0.5)

    def velocity(latents, timestep):
        return (latents - point) * 1000.0 / timestep[:, None, None, None]

    run = jax.jit(
        lambda keys: rollout.rollout(velocity, keys, SHAPE, schedule, "precise", 0.5, stochastic)
    )
    np.testing.assert_allclose(run(make_keys(2)).latents[-1, 1], point, atol=1e-5)


def test_sampled_variance_follows_the_gaussian_recursion():
    """Data N(0, s²) with its exact linear velocity, 20,000 numbers against the scalar recursion."""
    s, schedule = 0.5, schedules.make_schedule(10, 5.0)
    sigmas = np.asarray(schedule.sigmas, np.float64)

    def slope(sigma):
        return (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2)

    def velocity(latents, timestep):
        return slope(timestep[:, None] / 1000.0) * latents

    stochastic = sde.stochastic_steps("flow", schedule, 0.7)
    run = jax.jit(
        lambda keys: rollout.rollout(velocity, keys, (5000,), schedule, "flow", 0.7, stochastic)
    )
    sampled = np.asarray(run(make_keys(4)).latents)
    variance = 1.0
    for t in range(10):
        sigma, dt = sigmas[t], sigmas[t + 1] - sigmas[t]
        g = 0.7 * np.sqrt(sigma / (1 - (sigma if t else sigmas[1]))) * stochastic[t]
        gain = 1 + g**2 * dt / (2 * sigma)
        gain += slope(sigma) * dt * (1 + g**2 * (1 - sigma) / (2 * sigma))
        variance = gain**2 * variance - g**2 * dt
        assert sampled[t + 1].var() == pytest.approx(variance, rel=0.04)


def test_a_sample_does_not_depend_on_its_batch():
    keys = make_keys(8)
    stochastic = np.arange(T) < T - 1
    whole = sample(keys, stochastic).latents
    halves = [sample(keys[i : i + 4], stochastic).latents for i in (0, 4)]
    np.testing.assert_allclose(whole, np.concatenate(halves, axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(whole[0], np.concatenate([half[0] for half in halves]))


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    keys = make_keys(8)
    stochastic = np.arange(T) < T - 1
    want = sample(keys, stochastic)
    got = sample(jax.device_put(keys, NamedSharding(mesh, P("data"))), stochastic)
    assert len(got.latents.sharding.device_set) == 8
    assert got.latents.addressable_shards[0].data.shape == (T + 1, 1, *SHAPE)
    np.testing.assert_array_equal(got.latents[0], want.latents[0])
    np.testing.assert_allclose(got.latents, want.latents, rtol=1e-6, atol=1e-6)


def test_ratio_is_one_from_the_stored_trajectory():
    """μ_old from the stored states and μ_new from the same model: |ratio - 1| ≤ 1e-6 everywhere."""
    keys = make_keys(4)
    stochastic = np.arange(T) < T - 1
    trajectory = sample(keys, stochastic)
    schedule = schedules.make_schedule(T, 5.0)

    @jax.jit
    def log_ratio(t):
        sigma, sigma_next = schedule.sigmas[t], schedule.sigmas[t + 1]
        latents = trajectory.latents[t]
        velocity = velocity_fn(latents, jnp.full(4, schedule.timesteps[t]))
        mean = sde.transition("precise", velocity, latents, sigma, sigma_next, 0.5).mean
        drawn = noise.step_noise(keys, t, SHAPE)
        old = rollout.behaviour_mean(trajectory.latents[t + 1], drawn, trajectory.stds[t])
        return sde.log_ratio(drawn, mean, old, trajectory.stds[t])

    ratios = np.exp(np.stack([log_ratio(t) for t in range(T)]))
    assert np.abs(ratios - 1).max() <= 1e-6
    assert np.all(ratios[-1] == 1)


def test_initial_latents_can_be_given():
    keys = make_keys(2)
    initial = jnp.ones((2, *SHAPE))
    run = jax.jit(
        lambda: rollout.rollout(
            velocity_fn,
            keys,
            SHAPE,
            schedules.make_schedule(2, 1.0),
            "flow",
            0.5,
            np.zeros(2, bool),
            initial_latents=initial,
        )
    )
    latents = run().latents
    np.testing.assert_array_equal(latents[0], initial)
    np.testing.assert_array_equal(latents[:, 0], latents[:, 1])


def test_a_clamp_bounds_the_noise():
    """Flow-GRPO's std is eta·sqrt(σ/(1 - σ)·(σ - σ')), with 1 - σ at least the clamp."""
    run = jax.jit(
        lambda keys: rollout.rollout(
            velocity_fn,
            keys,
            SHAPE,
            schedules.make_schedule(T, 5.0),
            "flow",
            0.5,
            np.ones(T, bool),
            clamp=0.3,
        )
    )
    sigmas = np.asarray(schedules.make_schedule(T, 5.0).sigmas, np.float64)
    sigma, after = sigmas[:-1], sigmas[1:]
    wanted = 0.5 * np.sqrt(sigma / np.maximum(1 - sigma, 0.3) * (sigma - after))
    np.testing.assert_allclose(run(make_keys(2)).stds, wanted, rtol=1e-5)


def test_bad_input():
    schedule = schedules.make_schedule(2, 1.0)
    always = np.ones(2, bool)
    with pytest.raises(ValueError, match="kind='sde'"):
        rollout.rollout(velocity_fn, make_keys(2), SHAPE, schedule, "sde", 0.5, always)
    with pytest.raises(ValueError, match="typed PRNG keys"):
        rollout.rollout(velocity_fn, jnp.zeros(2), SHAPE, schedule, "flow", 0.5, always)
    with pytest.raises(AssertionError):
        rollout.rollout(velocity_fn, make_keys(2), SHAPE, schedule, "flow", 0.5, np.ones(3, bool))


def test_steps_may_be_stochastic_for_some_samples_only():
    """A mask for each sample gives what each sample gets alone with its own mask."""
    schedule = schedules.make_schedule(4, 3.0)
    keys = noise.sample_keys(0, 0, 0, np.arange(3, dtype=np.uint32), np.zeros(3, np.uint32))
    mask = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)  # [T, B]

    def sample(keys, stochastic):
        return rollout.rollout(
            lambda x, t: 0.3 * x + t[:, None] / 1000, keys, (2,), schedule, "precise", 0.7,
            stochastic,
        )  # fmt: skip

    together = sample(keys, mask)
    assert together.stds.shape == (4, 3)
    np.testing.assert_array_equal(together.stds > 0, mask)
    for b in range(3):
        alone = sample(keys[b : b + 1], mask[:, b])
        np.testing.assert_allclose(together.latents[:, b], alone.latents[:, 0], rtol=1e-6)


def test_flat_states_are_the_same_numbers():
    keys, stochastic = make_keys(4), np.ones(T, bool)
    whole, flat = sample(keys, stochastic), sample(keys, stochastic, flat=True)
    assert flat.latents.shape == (T + 1, 4, 24)
    np.testing.assert_array_equal(flat.latents.reshape(whole.latents.shape), whole.latents)
    np.testing.assert_array_equal(flat.stds, whole.stds)
