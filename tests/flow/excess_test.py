import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.flow import excess, noise, rollout, schedules


def before_last(steps: int) -> np.ndarray:
    return np.arange(steps) < steps - 1


@pytest.mark.parametrize(("kind", "value"), [("precise", 0.233), ("flow", 0.303)])
def test_point_data_after_twenty_steps(kind, value):
    """The reference values at shift 5, eta 0.5, before the last step."""
    schedule = schedules.host_schedule(20, 5.0)
    found = excess.point_mass(kind, schedule, 0.5, before_last(20))
    assert found.excess[18] == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize("kind", ["ode", "cps"])
def test_point_data_is_exact_for_ode_and_cps(kind):
    schedule = schedules.host_schedule(20, 5.0)
    np.testing.assert_allclose(
        excess.point_mass(kind, schedule, 0.5, before_last(20)).excess, 0, atol=1e-12
    )


def test_first_step_adds_what_the_formula_says():
    """Var - σ'² = Σ (1 - σ'/σ) + Σ²/(4σ²), from the exact state."""
    schedule = schedules.host_schedule(7, 3.0)
    for kind in ("precise", "flow", "dance"):
        found = excess.point_mass(kind, schedule, 0.8, before_last(7))
        sigma_next, variance = float(schedule.sigmas[1]), found.stds[0] ** 2
        want = variance * (1 - sigma_next) + variance**2 / 4
        assert found.variances[0] - sigma_next**2 == pytest.approx(want, rel=1e-9)


def test_a_clamp_makes_the_first_step_smaller():
    """As above, Σ = eta²·σ·(σ - σ')/clamp at σ = 1: in the noise and in the mean."""
    schedule = schedules.host_schedule(7, 3.0)
    sigma_next = float(schedule.sigmas[1])
    found = excess.point_mass("flow", schedule, 0.8, before_last(7), clamp=0.4)
    variance = 0.8**2 * (1 - sigma_next) / 0.4
    assert found.stds[0] ** 2 == pytest.approx(variance, rel=1e-9)
    want = variance * (1 - sigma_next) + variance**2 / 4
    assert found.variances[0] - sigma_next**2 == pytest.approx(want, rel=1e-9)
    # λ of the second step reads the clamp too.
    s, e = (float(x) for x in schedule.sigmas[1:3])
    variance = 0.8**2 * s * (s - e) / 0.4
    gain = e / s - variance / (2 * s) * (1 + (1 - s) / s)
    want = gain**2 * found.variances[0] + variance
    assert found.variances[1] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "kind", "value"),
    [
        (20, "precise", -0.1903),
        (20, "flow", -0.1870),
        (20, "cps", -0.3423),
        (2560, "precise", -0.0016),
        (2560, "flow", 0.0026),
        (2560, "cps", -0.1520),
    ],
)
def test_variance_of_unit_gaussian_data(steps, kind, value):
    """The reference values: flow is nearer at T = 20, precise at 2560; cps loses 15 %."""
    schedule = schedules.host_schedule(steps, 5.0)
    found = excess.gaussian_data(kind, schedule, 0.5, before_last(steps))
    assert found.variances[-1] - 1 == pytest.approx(value, abs=6e-5)


def error_of_unit_variance(kind: str, steps: int, eta: float) -> float:
    # In float64: so short steps are lost in the rounding of the schedule that samplers run on.
    u = np.linspace(1.0, 0.0, steps + 1)
    sigmas = 5.0 * u / (1.0 + 4.0 * u)
    schedule = schedules.Schedule(sigmas, 1000.0 * sigmas[:-1])
    return excess.gaussian_data(kind, schedule, eta, before_last(steps)).variances[-1] - 1


@pytest.mark.parametrize("kind", ["ode", "precise", "dance"])
def test_first_order_kinds_converge_to_the_true_variance(kind):
    few, many = (error_of_unit_variance(kind, steps, 0.5) for steps in (10_000, 40_000))
    assert np.log(few / many) / np.log(4) == pytest.approx(1, abs=1e-3)
    assert abs(many) < 2e-4


def test_flow_converges_as_slowly_as_its_first_step_is_forgotten():
    """The noise of the first step, whose std is eta at every T, fades like T^(-eta²)."""
    steps = (2_560, 5_000, 10_000, 100_000, 400_000)
    errors = [error_of_unit_variance("flow", count, 0.5) for count in steps]
    assert errors[:4] == pytest.approx([0.0025688, 0.0027544, 0.0026198, 0.0016786], abs=1e-7)
    assert np.log(errors[3] / errors[4]) / np.log(4) == pytest.approx(0.25, abs=0.02)
    assert error_of_unit_variance("flow", 2_560, 1.0) == pytest.approx(-0.0011252, abs=1e-7)
    few, many = (error_of_unit_variance("flow", count, 1.0) for count in (10_000, 40_000))
    assert np.log(few / many) / np.log(4) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["precise", "flow", "dance", "cps"])
def test_the_recursion_is_what_the_sampler_does(kind):
    """20 000 one-element samples through the real sampler, at every step."""
    schedule, count, mean, std = schedules.make_schedule(6, 3.0), 20_000, 0.7, 0.5
    stochastic = np.array([True, True, False, True, True, False])

    def velocity(x, timestep):
        sigma = (timestep / 1000)[:, None]
        total = (1 - sigma) ** 2 * std**2 + sigma**2
        centred = x - (1 - sigma) * mean
        return (sigma - (1 - sigma) * std**2) / total * centred - mean

    hashes = np.arange(count, dtype=np.uint32)
    keys = noise.sample_keys(0, 0, 0, hashes, np.zeros(count, np.uint32))
    run = jax.jit(
        lambda keys: rollout.rollout(velocity, keys, (1,), schedule, kind, 0.8, stochastic)
    )
    latents = np.asarray(run(keys).latents[1:, :, 0], np.float64)
    want = excess.gaussian_data(kind, schedule, 0.8, stochastic, mean, std)
    error = np.sqrt(want.variances / count)
    assert (np.abs(latents.mean(axis=1) - want.means) < 5 * error).all()
    np.testing.assert_allclose(latents.var(axis=1), want.variances, rtol=5 * np.sqrt(2 / count))
    assert jnp.all(want.true_variances > 0)
