import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.flow import kinds, schedules, sde
from sage_grpo_jax.grpo import equalizer

SCHEDULE = schedules.host_schedule(20, 5.0)
ALL = np.ones(20, bool)


def test_table_of_precise_weights():
    weights = equalizer.equalizer_weights("precise", SCHEDULE, 0.5, ALL)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(
        weights[np.array([0, 1, 5, 9, 14, 19])], [8.16, 5.30, 1.95, 1.00, 0.40, 0.055], rtol=8e-3
    )
    scale = equalizer.gradient_scale("precise", SCHEDULE, 0.5)
    assert scale.max() / scale.min() == pytest.approx(148, rel=0.01)


def test_medians():
    scale = equalizer.gradient_scale("precise", SCHEDULE, 0.5)
    for name, want in (("lower", np.sort(scale)[9]), ("mean", np.median(scale))):
        weights = equalizer.equalizer_weights("precise", SCHEDULE, 0.5, ALL, median=name)
        np.testing.assert_allclose(weights, want / scale, rtol=1e-6)
    odd = equalizer.equalizer_weights("flow", SCHEDULE, 0.5, np.arange(20) < 7)
    assert np.sum(np.asarray(odd) == 1) == 1


@pytest.mark.parametrize("log_prob", sde.LOG_PROBS)
@pytest.mark.parametrize("kind", ["precise", "flow", "dance", "cps"])
def test_gradient_scale_is_that_of_the_log_probability(kind, log_prob):
    """N_t against autodiff: d log p(x' | v)/dv = ε·N_t (squared: 2·ε·N_t)."""
    epsilon = 0.8

    @jax.jit
    @jax.vmap
    def gradient(sigma, sigma_next):
        def log_density(v):
            mean, std = sde.transition(kind, v, jnp.ones(1), sigma, sigma_next, 0.5)
            next_sample = jax.lax.stop_gradient(mean + std * epsilon)
            return sde.log_prob(next_sample, mean, std, log_prob=log_prob)[0]

        return jnp.abs(jax.grad(log_density)(jnp.ones(1))[0])

    measured = gradient(SCHEDULE.sigmas[:-1], SCHEDULE.sigmas[1:])
    factor = epsilon if log_prob == "gaussian" else 2 * epsilon
    want = equalizer.gradient_scale(kind, SCHEDULE, 0.5, log_prob=log_prob) * factor
    np.testing.assert_allclose(measured, want, rtol=2e-5, atol=1e-9)


def test_weighted_steps_have_the_same_scale():
    for kind, log_prob in (("flow", "gaussian"), ("cps", "squared")):
        trained = sde.stochastic_steps(kind, SCHEDULE, 0.5)
        weights = equalizer.equalizer_weights(kind, SCHEDULE, 0.5, trained, log_prob=log_prob)
        scale = equalizer.gradient_scale(kind, SCHEDULE, 0.5, log_prob=log_prob)
        products = (np.asarray(weights) * scale)[trained]
        np.testing.assert_allclose(products, products[0], rtol=1e-6)


def test_untrained_and_noiseless_steps_are_left_out():
    window = (np.arange(20) >= 3) & (np.arange(20) < 8)
    weights = np.asarray(equalizer.equalizer_weights("precise", SCHEDULE, 0.5, window))
    assert np.all(weights[~window] == 0)
    assert weights[5] == 1
    with_last = np.asarray(equalizer.equalizer_weights("cps", SCHEDULE, 0.5, ALL))
    without = np.asarray(equalizer.equalizer_weights("cps", SCHEDULE, 0.5, np.arange(20) < 19))
    assert with_last[-1] == 0
    np.testing.assert_array_equal(with_last, without)
    clamped = schedules.host_schedule(1000, 20.0)
    weights = np.asarray(equalizer.equalizer_weights("precise", clamped, 0.5, np.ones(1000, bool)))
    assert np.all(weights[:56] == 0)
    assert np.all(np.isfinite(weights) & (weights[56:] > 0)[-1])
    for kind, eta in (("ode", 0.5), ("flow", 0.0)):
        assert not np.any(equalizer.equalizer_weights(kind, SCHEDULE, eta, ALL))


@pytest.mark.parametrize("kind", kinds.clamped_kinds())
def test_a_clamp_changes_the_steps_that_it_touches(kind):
    """N = λ/std of the first step, with 1 - σ = 0.02 in place of 0; the others are as before."""
    sigmas = np.asarray(SCHEDULE.sigmas, np.float64)
    start, end = sigmas[:2]
    variance = {
        "precise": max(0.0, np.log(max(1 - end, 0.02) / 0.02) - (max(1 - end, 0.02) - 0.02)),
        "flow": start / 0.02 * (start - end),
    }[kind]
    clamped = equalizer.gradient_scale(kind, SCHEDULE, 0.5, clamp=0.02)
    own = equalizer.gradient_scale(kind, SCHEDULE, 0.5)
    if variance == 0:
        assert clamped[0] == 0
    else:
        assert clamped[0] == pytest.approx((start - end) / (0.5 * variance**0.5), rel=1e-6)
    touched = 1 - sigmas[:-1] < 0.02
    assert touched[:2].all()
    np.testing.assert_array_equal(clamped[~touched], own[~touched])


def test_can_be_called_while_tracing():
    @jax.jit
    def weight(t):
        schedule = schedules.make_schedule(20, 5.0)
        return equalizer.equalizer_weights("precise", schedule, 0.5, ALL)[t]

    assert weight(9) == 1.0


def test_bad_input():
    with pytest.raises(ValueError, match="median='upper'"):
        equalizer.equalizer_weights("flow", SCHEDULE, 0.5, ALL, median="upper")
    with pytest.raises(ValueError, match="log_prob='l2'"):
        equalizer.equalizer_weights("flow", SCHEDULE, 0.5, ALL, log_prob="l2")
    with pytest.raises(ValueError, match=r"trained: must have shape \(20,\)"):
        equalizer.equalizer_weights("flow", SCHEDULE, 0.5, ALL[:3])
