"""The GRPO gradient against the gradient of the expected reward, on one Gaussian step.

The policy is one denoising step: x' ~ N(mean(v), std²·I) from a fixed state, and its parameters are
the velocity v itself. Rewards are functions of x' whose expectation and optimum are known exactly,
so that the expectation of our gradient is known too. Estimates come with their standard errors.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.flow import sde
from sage_grpo_jax.grpo import advantage, loss

KIND, ETA, SIGMA, SIGMA_NEXT = "precise", 0.5, 0.8, 0.65
SAMPLE = np.array([0.3, -0.5, 1.1])
VELOCITY = np.array([0.4, 0.2, -0.9])
CENTRE = np.array([0.1, -0.6, 0.9])  # where the quadratic reward is best
SLOPE = np.array([0.6, -1.2, 0.8])
GROUP, GROUPS = 4, 40_000


def step(velocity):
    """Mean [D], std and d mean / d velocity of the step; float64, from the definition."""
    a, b = 1 - SIGMA, 1 - SIGMA_NEXT
    variance = ETA**2 * (math.log(b / a) - (b - a))
    # mean = x + dt·v - variance/(2σ)·(x + (1 - σ)·v)
    sensitivity = (SIGMA_NEXT - SIGMA) - variance / (2 * SIGMA) * (1 - SIGMA)
    return (
        SAMPLE * (1 - variance / (2 * SIGMA)) + sensitivity * velocity,
        variance**0.5,
        sensitivity,
    )


def quadratic(samples):
    return -jnp.sum((samples - CENTRE) ** 2, axis=-1)


def linear(samples):
    return samples @ SLOPE


@jax.jit(static_argnames=("reward", "objective", "std_floor"))
def group_gradients(velocity, noise_PxGxD, *, reward, objective="ppo", std_floor=0.0):
    """The gradient of the GRPO loss of each group [P, D], by the functions that training uses."""
    # One denoising step over D elements; the ratio is 1, as before the first update.
    shape = noise_PxGxD.shape[1:]

    def transition(velocity):
        v, x = jnp.broadcast_to(velocity, shape), jnp.broadcast_to(jnp.asarray(SAMPLE), shape)
        return sde.transition(KIND, v, x, SIGMA, SIGMA_NEXT, ETA)

    old = transition(velocity)
    rewards = reward(old.mean + old.std * noise_PxGxD)
    valid = jnp.ones(rewards.shape, bool)
    advantages = advantage.group_advantages(rewards, valid, 0.0, None, std_floor=std_floor)

    def group_loss(velocity, noise, advantages):
        new = transition(velocity)
        ratio = sde.log_ratio(noise, new.mean, old.mean, new.std, reduction="sum")
        return loss.policy_loss(ratio[:, None], advantages, jnp.ones(1), 1e-4, objective=objective)[
            0
        ]

    gradient = jax.vmap(jax.grad(group_loss), (None, 0, 0))
    return gradient(jnp.asarray(velocity, jnp.float32), noise_PxGxD, advantages)


def draw(seed, groups=GROUPS):
    return np.random.default_rng(seed).standard_normal((groups, GROUP, 3)).astype(np.float32)


def mean_and_error(values):
    """Mean over the groups and its standard error, float64."""
    values = np.asarray(values, np.float64)
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def assert_within_error(found, error, wanted, width=4.5):
    """Inside the confidence interval, which has to be narrow to mean anything."""
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(wanted)
    np.testing.assert_array_less(np.abs(found - wanted), width * error)


def quadrature_gradient(reward_of_samples):
    """d E[reward] / d velocity by Gauss-Hermite quadrature and central differences, float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    grid = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), -1).reshape(-1, 3)
    weight = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * 3), -1), -1).ravel()

    def expected(velocity):
        mean, std, _ = step(velocity)
        return float(weight @ reward_of_samples(mean + std * grid))

    unit = np.eye(3) * 1e-4
    return np.array([(expected(VELOCITY + e) - expected(VELOCITY - e)) / 2e-4 for e in unit])


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_gradient_is_that_of_the_expected_reward(objective):
    """With a constant in place of the group's std the gradient is exact up to (G - 1)/G."""
    floor = 100.0
    gradients = group_gradients(
        VELOCITY, draw(0), reward=quadratic, objective=objective, std_floor=floor
    )
    found, error = mean_and_error(gradients)
    truth = quadrature_gradient(lambda x: -np.sum((x - CENTRE) ** 2, -1))
    mean, _, sensitivity = step(VELOCITY)
    np.testing.assert_allclose(truth, -2 * (mean - CENTRE) * sensitivity, rtol=1e-6)
    # The mean of the group holds 1/G of each member's own reward.
    assert_within_error(found, error, -truth * (GROUP - 1) / GROUP / floor)


def test_group_normalisation_scales_by_a_known_factor():
    """A linear reward is normal: E[mean(A·ε)] is the mean of the std of G normal numbers."""
    found, error = mean_and_error(group_gradients(VELOCITY, draw(1), reward=linear))
    _, std, sensitivity = step(VELOCITY)
    mean_std = math.sqrt(2 / GROUP) * math.gamma(GROUP / 2) / math.gamma((GROUP - 1) / 2)
    direction = SLOPE / np.linalg.norm(SLOPE)
    assert_within_error(found, error, -direction * mean_std * sensitivity / std)


def test_group_normalisation_keeps_the_direction():
    """By symmetry about the axis to the optimum nothing else can remain of the expectation."""
    gradients = np.asarray(group_gradients(VELOCITY, draw(2), reward=quadratic), np.float64)
    mean, _, sensitivity = step(VELOCITY)
    downhill = -(CENTRE - mean) * sensitivity
    axis = downhill / np.linalg.norm(downhill)
    along, error = mean_and_error(gradients @ axis)
    assert along > 50 * error
    across, error = mean_and_error(gradients - np.outer(gradients @ axis, axis))
    np.testing.assert_array_less(np.abs(across), 4.5 * error + 1e-12)


def test_ppo_and_reinforce_agree_at_ratio_one():
    ppo, reinforce = (
        group_gradients(VELOCITY, draw(3, 100), reward=quadratic, objective=name)
        for name in loss.OBJECTIVES
    )
    np.testing.assert_allclose(ppo, reinforce, rtol=1e-5, atol=1e-6)


def test_ascent_reaches_the_optimum():
    mean, _, sensitivity = step(VELOCITY)
    best = VELOCITY + (CENTRE - mean) / sensitivity
    velocity, visited = np.array(VELOCITY), []
    for update in range(400):
        gradient = np.asarray(group_gradients(velocity, draw(update, 256), reward=quadratic))
        velocity = velocity - 0.3 * gradient.mean(0)
        visited.append(velocity)
    # After the way there it wanders about the optimum: the mean over blocks tells how far.
    blocks = np.array(visited[100:]).reshape(10, 30, 3).mean(1)
    centre, error = blocks.mean(0), blocks.std(0, ddof=1) / math.sqrt(len(blocks))
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(best - VELOCITY)
    np.testing.assert_array_less(np.abs(centre - best), 4.8 * error)  # t, 9 degrees: 99.9 %
