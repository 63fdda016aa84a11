"""Properties of schedules, advantages and masks over random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sage_grpo_jax.flow import schedules, sde
from sage_grpo_jax.grpo import advantage, equalizer, loss

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
GROUPS = (3, 4)  # one shape: one compilation


@QUICK
@given(st.integers(1, 200), st.floats(0.1, 20.0))
def test_schedules_fall_from_one_to_zero(num_steps, shift):
    schedule = schedules.host_schedule(num_steps, shift)
    assert schedule.sigmas.shape == (num_steps + 1,)
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0
    assert (np.diff(schedule.sigmas) < 0).all()
    np.testing.assert_allclose(schedule.timesteps, 1000 * schedule.sigmas[:-1], rtol=1e-6)
    # A higher shift spends more steps near pure noise.
    higher = schedules.host_schedule(num_steps, shift + 1)
    assert (higher.sigmas >= schedule.sigmas).all()


@QUICK
@given(
    st.sampled_from(["precise", "flow", "dance", "cps"]),
    st.integers(2, 40),
    st.floats(0.5, 12.0),
    st.floats(0.01, 1.0),
)
def test_trained_steps_have_finite_positive_weights(kind, num_steps, shift, eta):
    schedule = schedules.host_schedule(num_steps, shift)
    trained = np.asarray(sde.stochastic_steps(kind, schedule, eta, last_step="deterministic"))
    assert trained.shape == (num_steps,)
    assert not trained[-1]
    assume(trained.any())
    weights = np.asarray(equalizer.equalizer_weights(kind, schedule, eta, trained))
    assert np.isfinite(weights).all()
    assert (weights[trained] > 0).all()


_advantages = jax.jit(lambda r, v: advantage.group_advantages(r, v, 1e-4, 5.0))
REWARDS = st.lists(
    st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0])), min_size=12, max_size=12
)
MASKS = st.lists(st.booleans(), min_size=12, max_size=12)


@QUICK
@given(REWARDS, MASKS)
def test_advantages_are_finite_bounded_and_zero_where_masked(rewards, mask):
    rewards = np.array(rewards, np.float32).reshape(GROUPS)
    # Sums of squares of a group must fit into float32.
    rewards = np.where(np.abs(rewards) < 1e15, rewards, np.nan)
    valid = np.array(mask).reshape(GROUPS)
    found = np.asarray(_advantages(rewards, valid))
    usable = valid & np.isfinite(rewards)
    assert np.isfinite(found).all()
    assert (np.abs(found) <= 5).all()
    assert (found[~usable] == 0).all()
    for group, members, values in zip(found, usable, rewards, strict=True):
        if members.sum() < 2 or np.ptp(values[members]) == 0:
            assert (group == 0).all()
        order = np.argsort(values[members], kind="stable")
        assert (np.diff(group[members][order]) >= 0).all()


@QUICK
@given(st.lists(st.integers(-100, 100), min_size=12, max_size=12), MASKS, st.integers(0, 2**31))
def test_what_a_masked_sample_holds_does_not_matter(rewards, mask, seed):
    rewards = np.array(rewards, np.float32).reshape(GROUPS)
    valid = np.array(mask).reshape(GROUPS)
    noise = np.random.default_rng(seed).choice([np.nan, np.inf, -1e30, 7.0], GROUPS)
    disturbed = np.where(valid, rewards, noise).astype(np.float32)
    np.testing.assert_array_equal(_advantages(rewards, valid), _advantages(disturbed, valid))


@jax.jit
def _loss_and_gradient(log_ratio, advantages, mask):
    def total(x):
        weights = jnp.ones((1,))
        return loss.policy_loss(x, advantages, weights, 1e-2, mask=mask, normalizer=12.0)[0]

    return jax.value_and_grad(total)(log_ratio)


@QUICK
@given(MASKS, st.integers(0, 2**31))
def test_masked_samples_have_no_loss_and_no_gradient(mask, seed):
    rng, mask = np.random.default_rng(seed), np.array(mask)
    log_ratio = rng.normal(0, 1e-2, (12, 1)).astype(np.float32)
    advantages = rng.normal(0, 1, 12).astype(np.float32)
    value, gradient = _loss_and_gradient(log_ratio, advantages, mask[:, None])
    # By hand: PPO's minimum of both terms over what is valid, divided by the fixed number.
    ratio = np.exp(log_ratio[:, 0].astype(np.float64))
    terms = np.minimum(ratio * advantages, np.clip(ratio, 0.99, 1.01) * advantages)
    np.testing.assert_allclose(value, -terms[mask].sum() / 12, rtol=1e-4, atol=1e-6)
    assert (np.asarray(gradient)[~mask] == 0).all()
    assert np.isfinite(gradient).all()
