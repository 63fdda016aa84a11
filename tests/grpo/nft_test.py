"""DiffusionNFT's loss, against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.grpo import nft


def make_inputs(batch=5):
    rng = np.random.default_rng(3)
    old, target = rng.normal(size=(2, batch, 2, 3))
    velocity = old + 0.3 * rng.normal(size=old.shape)
    sigma = rng.uniform(0.1, 1.0, batch)
    good = rng.uniform(0, 1, batch)
    return velocity, old, target, sigma, good


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.1, 2.5])
def test_value_is_that_of_the_two_implicit_policies(beta, adaptive):
    velocity, old, target, sigma, good = make_inputs()
    wanted = np.zeros(5)
    for b in range(5):
        for weight, sign in ((good[b], 1.0), (1.0 - good[b], -1.0)):
            implicit = (1 - sign * beta) * old[b] + sign * beta * velocity[b]
            if adaptive:
                # In terms of the clean sample that either policy predicts, x - σ·v.
                state = np.ones((2, 3))
                error = (state - sigma[b] * implicit) - (state - sigma[b] * target[b])
                value = np.mean(error**2) / max(np.mean(np.abs(error)), 1e-5)
            else:
                value = np.mean((implicit - target[b]) ** 2)
            wanted[b] += weight * value / beta
    found = nft.nft_loss(
        *map(jnp.float32, (velocity, old, target, sigma, good)), beta, adaptive=adaptive
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def gradient(velocity, old, target, sigma, good, beta, adaptive):
    def total(v, v_old):
        return nft.nft_loss(v, v_old, target, sigma, good, beta, adaptive=adaptive).sum()

    return jax.grad(total, argnums=(0, 1))(jnp.float32(velocity), jnp.float32(old))


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_optimum_is_where_the_paper_puts_it(beta):
    """For one clean sample the loss is quadratic: v* = v_old + (2r - 1)/β·(target - v_old)."""
    _, old, target, sigma, good = make_inputs()
    shift = ((2 * good - 1) / beta)[:, None, None] * (target - old)
    at_optimum, into_old = gradient(old + shift, old, target, sigma, good, beta, False)
    np.testing.assert_allclose(at_optimum, 0.0, atol=2e-6)
    np.testing.assert_array_equal(into_old, 0.0)
    # And it is a minimum: the second derivative is 2β by element, whatever r.
    step = 0.01
    above, _ = gradient(old + shift + step, old, target, sigma, good, beta, False)
    np.testing.assert_allclose(above, 2 * beta * step / 6, rtol=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_good_samples_attract_and_bad_ones_repel(adaptive):
    """At v = v_old the gradient is (1 - 2r)·∂|v - target|², so its sign follows the reward."""
    _, old, target, sigma, _ = make_inputs()
    towards = target - old
    for good, sign in ((1.0, -1.0), (0.0, 1.0), (0.5, 0.0)):
        found, _ = gradient(old, old, target, sigma, np.full(5, good), 0.7, adaptive)
        inner = np.sum(np.asarray(found) * towards, axis=(1, 2))
        np.testing.assert_array_equal(np.sign(np.round(inner, 5)), sign)
    plain, _ = gradient(old, old, target, sigma, np.full(5, 0.8), 0.7, False)
    np.testing.assert_allclose(plain, -2 * 0.6 * towards / 6, rtol=1e-4, atol=1e-6)


def test_adaptive_weights_get_no_gradient():
    """r·L₊ alone: ∂ of the mean of e² over the fixed mean of |e|, e = σ·(v - target), β = 1."""
    velocity, old, target, sigma, _ = make_inputs()
    found, _ = gradient(velocity, old, target, sigma, np.ones(5), 1.0, True)
    error = sigma[:, None, None] * (velocity - target)
    scale = np.abs(error).mean((1, 2), keepdims=True)
    wanted = 2 * error / 6 / scale * sigma[:, None, None]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_exact_samples_do_not_divide_by_zero():
    old = np.ones((1, 2, 3))
    for adaptive in (False, True):
        found, _ = gradient(old, old, old, np.float32([0.5]), np.float32([1.0]), 1.0, adaptive)
        np.testing.assert_array_equal(found, 0.0)


def test_how_good_a_sample_is():
    advantages = jnp.float32([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, 7.0])
    wanted = [0.0, 0.0, 0.25, 0.5, 0.6, 1.0, 1.0]
    np.testing.assert_allclose(nft.optimality(advantages, 5.0), wanted, rtol=1e-6)
    with pytest.raises(ValueError, match=r"clip=0\.0: must be > 0"):
        nft.optimality(advantages, 0.0)


def test_the_forward_process_and_its_velocity():
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 3, 2, 2)).astype(np.float32)
    sigma = np.float32([1.0, 0.25, 0.5])
    states, target = nft.noised(clean, noise, sigma)
    np.testing.assert_array_equal(states[0], noise[0])
    np.testing.assert_allclose(states[1], 0.75 * clean[1] + 0.25 * noise[1], rtol=1e-6)
    # x - σ·v is the clean sample again.
    np.testing.assert_allclose(states - sigma[:, None, None] * target, clean, atol=1e-6)


def test_distance_of_velocities():
    a, b = np.float32([[1.0, 2.0], [0.0, 0.0]]), np.float32([[1.0, 4.0], [3.0, 0.0]])
    np.testing.assert_allclose(nft.velocity_distance(a, b), [2.0, 4.5])


def test_bad_beta():
    velocity, old, target, sigma, good = make_inputs()
    with pytest.raises(ValueError, match=r"beta=0\.0: must be > 0"):
        nft.nft_loss(velocity, old, target, sigma, good, 0.0)
