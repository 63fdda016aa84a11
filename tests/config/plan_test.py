"""Schedule, trained steps and weights of a recipe: every field that decides them, in float64."""

import numpy as np
import pytest

from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import step_plan
from sage_grpo_jax.policy import networks as networks_lib

FLOW = {
    "rollout.sde": "flow",
    "rollout.num_steps": 7,
    "rollout.shift": 2.0,
    "rollout.eta": 0.8,
    "loss.equalizer": True,
}


@pytest.fixture
def make_plan(make_config):
    def make(overrides):
        config = make_config({**FLOW, **overrides})
        networks = networks_lib.read_networks(config.model)
        return plan_lib.make_plan(config, networks.transformer, networks.vae)

    return make


def scales(log_prob="gaussian", eta=0.8, clamp=0.0):
    """N_t of Flow-GRPO's transition at all 7 steps: mean = x + dt·v - std²/(2σ)·(x + (1 - σ)·v)."""
    u = np.linspace(1, 0, 8)
    sigmas = 2 * u / (1 + u)
    sigma, after = sigmas[:-1], sigmas[1:]
    distance = np.where(sigma == 1, 1 - after, 1 - sigma)
    if clamp:
        distance = np.maximum(1 - sigma, clamp)
    std = eta * np.sqrt(sigma * (sigma - after) / distance)
    sensitivity = (sigma - after) + std**2 / (2 * sigma) * (1 - sigma)
    return sensitivity / std if log_prob == "gaussian" else sensitivity * std


def median_over(values, kind):
    ordered = np.sort(values)
    lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return lower if kind == "lower" else (lower + upper) / 2


@pytest.mark.parametrize("last_step", ["deterministic", "stochastic"])
@pytest.mark.parametrize("median", ["lower", "mean"])
@pytest.mark.parametrize("log_prob", ["gaussian", "squared"])
def test_weights_of_the_steps(make_plan, last_step, median, log_prob):
    made = make_plan(
        {"rollout.last_step": last_step, "loss.median": median, "loss.log_prob": log_prob}
    )
    trained = np.arange(7) < (6 if last_step == "deterministic" else 7)
    np.testing.assert_array_equal(made.trained, trained)
    assert made.positions == trained.sum()
    n = scales(log_prob)[trained]
    wanted = np.zeros(7)
    wanted[trained] = median_over(n, median) / n
    np.testing.assert_allclose(made.weights, wanted, rtol=1e-5)
    np.testing.assert_allclose(made.schedule.timesteps[1], 1000 * 12 / 13, rtol=1e-6)


def test_without_equalizer_every_trained_step_counts_alike(make_plan):
    made = make_plan({"loss.equalizer": False})
    np.testing.assert_array_equal(made.weights, [1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(made.kl_weights, [1, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize("log_prob", ["gaussian", "squared"])
def test_equalized_kl_weights_are_those_of_the_gaussian(make_plan, log_prob):
    made = make_plan({"trust_region.kl_time_weight": "equalized", "loss.log_prob": log_prob})
    n = scales()[:6]
    wanted = np.append((median_over(n, "lower") / n) ** 2, 0)
    np.testing.assert_allclose(made.kl_weights, wanted, rtol=1e-5)


def test_a_clamp_reaches_weights_and_steps(make_plan):
    made = make_plan({"rollout.clamp": 0.2, "trust_region.kl_time_weight": "equalized"})
    n = scales(clamp=0.2)[:6]
    wanted = np.append(median_over(n, "lower") / n, 0)
    np.testing.assert_allclose(made.weights, wanted, rtol=1e-5)
    np.testing.assert_allclose(made.kl_weights, wanted**2, rtol=1e-5)
    # The steps of SAGE-GRPO that end above σ = 0.8 inject nothing: 12/13 and 10/12 are there.
    made = make_plan({"rollout.sde": "precise", "rollout.clamp": 0.2})
    np.testing.assert_array_equal(made.trained, [0, 0, 1, 1, 1, 1, 0])


def test_a_window_at_the_start(make_plan):
    made = make_plan({"rollout.window": "first_k", "rollout.window_size": 3})
    np.testing.assert_array_equal(made.trained, np.arange(7) < 3)
    assert made.positions == 3
    n = scales()[:3]
    wanted = np.append(median_over(n, "lower") / n, np.zeros(4))
    np.testing.assert_allclose(made.weights, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "stride", "places"),
    [
        ("first_k", 1, 1),
        ("random_k", 1, 5),  # 2 of 6 steps in a row
        ("random_k", 3, 5),  # which does not read the stride
        ("progressive", 1, 5),
        ("progressive", 2, 3),  # after 0, 2 or 4 steps
        ("dynamic", 3, 2),
        ("decay", 5, 1),
    ],
)
def test_the_places_of_a_window_are_those_where_it_can_be(make_plan, window, stride, places):
    overrides = {"rollout.window": window, "rollout.window_size": 2}
    made = make_plan({**overrides, "rollout.window_motion.stride": stride})
    assert made.steps.window_places == places
    assert made.steps.varies == (places > 1)
    # Every place is one where some rollout has it, and no other.
    hashes = np.arange(64, dtype=np.uint32)
    starts = [step_plan.window_starts(made.steps, made.config, n, hashes) for n in range(0, 150, 5)]
    assert len(np.unique(starts)) == places
    # Steps are told apart by sample only where they differ.
    noisy = step_plan.noisy_steps(made.steps, np.int32([0, 0]))
    assert np.shape(noisy) == ((7,) if places == 1 else (7, 2))
    first = np.broadcast_to(np.asarray(noisy).reshape(7, -1), (7, 2))
    np.testing.assert_array_equal(first, np.arange(7)[:, None] < [2, 2])


def test_eta_that_matches_another_sampler(make_plan):
    """The sum of the variances over the noisy steps is DanceGRPO's at its eta."""
    made = make_plan({"rollout.eta_match.kind": "dance", "rollout.eta_match.eta": 0.3})
    u = np.linspace(1, 0, 8)
    sigmas = 2 * u / (1 + u)
    wanted = 0.3**2 * (sigmas[0] - sigmas[-2])
    sigma, after = sigmas[:-2], sigmas[1:-1]
    distance = np.where(sigma == 1, 1 - after, 1 - sigma)
    found = made.config.rollout.eta**2 * np.sum(sigma * (sigma - after) / distance)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_latent_shape(make_plan):
    """Time is compressed by 4 after the first frame, space by 8."""
    made = make_plan({"video.frames": 9, "video.height": 32, "video.width": 48})
    assert made.latent_shape == (3, 4, 6, 4)
