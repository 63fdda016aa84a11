"""Moving averages, against plain Python in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.grpo import averaging


def test_an_average_forgets_its_beginning_sooner():
    average, tree, wanted = {"w": jnp.float32([1.0, -2.0])}, None, np.array([1.0, -2.0])
    for n in range(1, 200):
        tree = {"w": jnp.float32([np.sin(n), n / 100])}
        average = averaging.mix(average, tree, averaging.warmed_up(jnp.int32(n), 0.9))
        decay = min((1 + n) / (10 + n), 0.9)
        wanted = decay * wanted + (1 - decay) * np.array([np.sin(n), n / 100])
        np.testing.assert_allclose(average["w"], wanted, rtol=1e-5, atol=1e-6)
    assert float(averaging.warmed_up(jnp.int32(1), 0.9)) == pytest.approx(2 / 11)
    assert float(averaging.warmed_up(jnp.int32(79), 0.9)) == pytest.approx(80 / 89)
    assert float(averaging.warmed_up(jnp.int32(1000), 0.9)) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ((0, 0.001, 0.5), {0: 0.0, 1: 0.001, 100: 0.1, 499: 0.499, 500: 0.5, 9000: 0.5}),
        ((75, 0.0075, 0.999), {0: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999}),
    ],
)
def test_the_sampling_policy_lags_more_and_more(settings, wanted):
    """The two schedules of DiffusionNFT's configs."""
    for count, decay in wanted.items():
        assert float(averaging.ramp(jnp.int32(count), *settings)) == pytest.approx(decay, abs=1e-6)


def test_ends_of_the_range_are_exact():
    old, new = {"w": jnp.float32([0.1, 1e-7, 3e4])}, {"w": jnp.float32([0.7, -1e3, 1e-3])}
    kept = averaging.mix(old, new, jnp.float32(1.0))
    taken = averaging.mix(old, new, jnp.float32(0.0))
    np.testing.assert_array_equal(kept["w"], old["w"])
    np.testing.assert_array_equal(taken["w"], new["w"])
    same = averaging.mix(old, old, jnp.float32(0.3))
    np.testing.assert_array_equal(same["w"], old["w"])
