"""The noise of a window, and matched etas."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.flow import injected_noise, schedules, sde

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


def test_places_of_a_window():
    stochastic = np.array([0, 1, 1, 0, 1, 1, 0], bool)
    np.testing.assert_array_equal(injected_noise.window_places(stochastic), [stochastic])
    np.testing.assert_array_equal(
        injected_noise.window_places(stochastic, "first_k", 2), [[0, 1, 1, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        injected_noise.window_places(stochastic, "random_k", 3),
        [[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1, 0]],
    )
    np.testing.assert_array_equal(
        injected_noise.window_places(stochastic, "random_k", 9), [stochastic]
    )


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
