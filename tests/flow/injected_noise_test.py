"""The noise of a window, and matched etas."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.flow import injected_noise, schedules, sde, windows

SDE_KINDS = ("precise", "flow", "dance", "cps")


@pytest.mark.parametrize("kind", SDE_KINDS)
@pytest.mark.parametrize("other", SDE_KINDS)
def test_matched_eta_injects_the_same_variance(kind, other):
    schedule = schedules.make_schedule(20, 5.0)
    eta = injected_noise.matched_eta(kind, schedule, other, 0.4)
    assert (kind == other) == (eta == pytest.approx(0.4, rel=1e-12))

    def variance(kind, eta):
        pairs = zip(schedule.sigmas[:-2], schedule.sigmas[1:-1], strict=True)
        zeros = jnp.zeros((1, 2))
        return sum(float(sde.transition(kind, zeros, zeros, a, b, eta).std) ** 2 for a, b in pairs)

    assert variance(kind, eta) == pytest.approx(variance(other, 0.4), rel=1e-4)


def test_matched_eta_refuses_more_noise_than_a_kind_has():
    schedule = schedules.make_schedule(20, 5.0)
    with pytest.raises(ValueError, match="at most"):
        injected_noise.matched_eta("cps", schedule, "flow", 2.0)


def test_matched_eta_names_the_kind_without_a_stochastic_step():
    one = schedules.host_schedule(1, 3.0)
    with pytest.raises(ValueError, match=r"kind='precise' with eta=1\.0 has no stochastic step"):
        injected_noise.matched_eta("precise", one, "flow", 0.5)
    # The last step of cps is clean where that of precise is not.
    with pytest.raises(ValueError, match=r"kind='cps' with eta=0\.5 has no stochastic step"):
        injected_noise.matched_eta("precise", one, "cps", 0.5, "stochastic")


@pytest.mark.parametrize("last_step", sde.LAST_STEPS)
@pytest.mark.parametrize(("window", "size"), [("all", 0), ("first_k", 3), ("random_k", 3)])
@pytest.mark.parametrize(
    ("kind", "other"), [("precise", "flow"), ("dance", "cps"), ("cps", "precise")]
)
def test_matched_noise_in_a_window(kind, other, window, size, last_step):
    """The variance of each kind, added up over every place of its window by hand."""
    schedule = schedules.host_schedule(12, 3.0)
    eta = injected_noise.matched_eta(kind, schedule, other, 0.3, last_step, window, size)
    sigmas = schedule.sigmas.astype(np.float64)

    def variance(kind, eta):
        stds = [
            float(sde.step_coefficients(kind, a, b, eta, xp=np).std)
            for a, b in itertools.pairwise(sigmas)
        ]
        # cps has no noise in its last step, whatever is asked for.
        clean = last_step == "deterministic" or kind == "cps"
        noisy = [std**2 for std in stds][: 12 - clean]
        length = size or len(noisy)
        starts = range(len(noisy) - length + 1) if window == "random_k" else [0]
        return np.mean([sum(noisy[start : start + length]) for start in starts])

    assert variance(kind, eta) == pytest.approx(variance(other, 0.3), rel=1e-9)


@pytest.mark.parametrize(("kind", "clamp"), [("precise", 0.01), ("flow", 0.05)])
def test_matched_noise_with_a_clamp(kind, clamp):
    """The clamp is that of the sampler which is matched; the other keeps its authors'."""
    schedule = schedules.host_schedule(10, 3.0)
    eta = injected_noise.matched_eta(kind, schedule, "flow", 0.4, clamp=clamp)

    def variance(kind, eta, clamp):
        pairs = itertools.pairwise(schedule.sigmas[:-1].astype(np.float64))
        steps = (sde.step_coefficients(kind, a, b, eta, clamp=clamp, xp=np) for a, b in pairs)
        return sum(float(step.std) ** 2 for step in steps)

    assert variance(kind, eta, clamp) == pytest.approx(variance("flow", 0.4, 0.0), rel=1e-6)
    assert variance(kind, eta, 0.0) > 1.02 * variance("flow", 0.4, 0.0)


def test_matched_noise_of_a_moving_window_is_that_of_an_average_rollout():
    """All rollouts of one pass are gone through by hand."""
    schedule, motion = schedules.host_schedule(8, 3.0), windows.Motion(stay=4, stride=2)
    eta = injected_noise.matched_eta(
        "precise", schedule, "flow", 0.5, "stochastic", "decay", 3, motion=motion
    )

    def variance(kind, eta):
        sigmas = schedule.sigmas.astype(np.float64)
        stds = sde.step_coefficients(kind, sigmas[:-1], sigmas[1:], eta, xp=np).std
        starts = [windows.start_at(step, "decay", 8, 3, motion) for step in range(9)]
        assert starts == [0, 0, 0, 0, 2, 2, 2, 4, 4]
        return np.mean([np.sum(stds[start : start + 3] ** 2) for start in starts])

    assert variance("precise", eta) == pytest.approx(variance("flow", 0.5), rel=1e-9)
