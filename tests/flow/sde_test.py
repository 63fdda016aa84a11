import functools
import itertools
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sage_grpo_jax.flow import kinds, schedules, sde

STEPS = (0, 1, 5, 9, 14, 19)
# std per unit η at T = 20, shift 5; cps is at η = 0.5.
STD_TABLE = {
    "precise": (1.112, 0.851, 0.466, 0.379, 0.328, 0.159),
    "flow": (1.000, 1.037, 0.497, 0.399, 0.349, 0.234),
    "dance": (0.102, 0.106, 0.128, 0.161, 0.238, 0.456),
    "cps": (0.700, 0.692, 0.651, 0.589, 0.442, 0.0),
}
SDE_KINDS = ("precise", "flow", "dance", "cps")


@functools.partial(jax.jit, static_argnames="kind")
def jitted_transition(kind, velocity, sample, sigma, sigma_next, eta):
    return sde.transition(kind, velocity, sample, sigma, sigma_next, eta)


@functools.partial(jax.jit, static_argnames=("kind", "clamp"))
def clamped_transition(kind, velocity, sample, sigma, sigma_next, eta, clamp):
    return sde.transition(kind, velocity, sample, sigma, sigma_next, eta, clamp=clamp)


@functools.partial(jax.jit, static_argnames="kind")
def jitted_coefficients(kind, sigma, sigma_next, eta):
    return sde.step_coefficients(kind, sigma, sigma_next, eta)


def textbook_step(kind, v, x, sigma, sigma_next, sigma_first_next, eta):
    """Mean and std in float64, each kind as its authors write it."""
    dt = sigma_next - sigma
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    if kind == "precise":
        a, b = max(1 - sigma, 3e-3), max(1 - sigma_next, 3e-3)
        variance = eta**2 * (np.log(b / a) - (b - a))
        return x + dt * v + 0.5 * variance * score, np.sqrt(variance)
    if kind == "flow":
        g = eta * np.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_first_next)))
        mean = x * (1 + g**2 * dt / (2 * sigma)) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, g * np.sqrt(-dt)
    if kind == "dance":
        return x + dt * v - 0.5 * eta**2 * score * dt, eta * np.sqrt(-dt)
    if kind == "cps":
        std = sigma_next * np.sin(eta * np.pi / 2)
        return (1 - sigma_next) * x0 + sigma_next * np.cos(eta * np.pi / 2) * x1, std
    return x + dt * v, 0.0


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_std_table(kind):
    sigmas = schedules.make_schedule(20, 5.0).sigmas
    eta = 0.5 if kind == "cps" else 1.0
    std = sde.step_coefficients(kind, sigmas[:-1], sigmas[1:], eta).std
    np.testing.assert_allclose(std[np.array(STEPS)], STD_TABLE[kind], atol=6e-4)


@pytest.mark.parametrize("kind", sde.KINDS)
@pytest.mark.parametrize(
    ("num_steps", "shift", "eta"), [(20, 5.0, 0.5), (7, 0.5, 1.0), (1, 3, 0.3)]
)
def test_matches_the_textbook_forms_in_float64(kind, num_steps, shift, eta):
    rng = np.random.default_rng(num_steps)
    v, x = rng.normal(size=(2, 2, 3, 4))
    sigmas = np.asarray(schedules.make_schedule(num_steps, shift).sigmas, np.float64)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        mean, std = jitted_transition(kind, v, x, sigma, sigma_next, eta)
        want_mean, want_std = textbook_step(kind, v, x, sigma, sigma_next, sigmas[1], eta)
        assert mean.dtype == std.dtype == jnp.float32
        assert std.shape == ()
        np.testing.assert_allclose(mean, want_mean, rtol=2e-6, atol=4e-6)
        np.testing.assert_allclose(std, want_std, rtol=5e-5, atol=1e-7)


def test_float64_inputs_are_computed_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        v, x = rng.normal(size=(2, 2, 3))
        for kind in sde.KINDS:
            mean, std = sde.transition(kind, v, x, 0.9, 0.8, 0.5)
            want_mean, want_std = textbook_step(kind, v, x, 0.9, 0.8, 0.8, 0.5)
            assert mean.dtype == jnp.float64
            np.testing.assert_allclose(mean, want_mean, rtol=1e-12)
            np.testing.assert_allclose(std, want_std, rtol=1e-10)


def test_precise_variance_is_accurate_in_float32():
    """The integral in extended precision, on the very σ that the sampler uses."""
    for shift in (0.1, 1.0, 3.0, 5.0, 20.0):
        for num_steps in (1, 8, 20, 57, 112, 458, 998):
            sigmas = schedules.host_schedule(num_steps, shift).sigmas
            padded = np.zeros(999, np.float32)
            padded[: num_steps + 1] = sigmas
            std = jitted_coefficients("precise", padded[:-1], padded[1:], jnp.float32(1.0)).std
            a_and_b = np.maximum(1 - sigmas.astype(np.longdouble), np.longdouble(3e-3))
            z = np.diff(a_and_b) / a_and_b[:-1]
            want = np.sqrt(np.log1p(z) - np.diff(a_and_b))
            np.testing.assert_allclose(std[:num_steps], want.astype(float), rtol=1e-4, atol=1e-12)


def test_clamped_steps_have_no_noise():
    schedule = schedules.make_schedule(1000, 20.0)
    noisy = sde.stochastic_steps("precise", schedule, 1.0, "stochastic")
    assert np.sum(~noisy) == 56
    assert not noisy[:56].any()


def test_stochastic_steps_are_those_of_exact_arithmetic():
    """A step that ends exactly at the clamp is inside: at T = 1000, shift 1, so does step 2."""
    clamp = Fraction(3, 1000)
    for shift in (Fraction(1, 10), Fraction(1), Fraction(5), Fraction(20)):
        for num_steps in (1, 10, 20, 112, 500, 999, 1000):
            schedule = schedules.host_schedule(num_steps, float(shift))
            u = [1 - Fraction(t + 1, num_steps) for t in range(num_steps)]
            want = [1 - shift * x / (1 + (shift - 1) * x) > clamp for x in u]
            found = sde.stochastic_steps("precise", schedule, 1.0, "stochastic")
            np.testing.assert_array_equal(found, want, err_msg=f"T={num_steps}, shift {shift}")
    schedule = schedules.host_schedule(1000, 1.0)
    assert list(sde.stochastic_steps("precise", schedule, 1.0, "stochastic")) == [0] * 3 + [1] * 997


def test_host_and_device_agree_on_which_steps_are_stochastic():
    for shift in (0.1, 1.0, 20.0):
        for num_steps in (1, 100, 300, 500, 916, 1000):
            schedule = schedules.host_schedule(num_steps, shift)
            padded = np.zeros(1001, np.float32)
            padded[: num_steps + 1] = schedule.sigmas
            for kind, eta in (("precise", 1.0), ("cps", 0.5)):
                std = jitted_coefficients(kind, padded[:-1], padded[1:], jnp.float32(eta)).std
                host = sde.stochastic_steps(kind, schedule, eta, "stochastic")
                np.testing.assert_array_equal(np.asarray(std)[:num_steps] > 0, host)


def test_last_step_and_kinds_without_noise():
    schedule = schedules.make_schedule(5, 3.0)
    for kind in ("precise", "flow", "dance"):
        np.testing.assert_array_equal(sde.stochastic_steps(kind, schedule, 0.5), [1, 1, 1, 1, 0])
        assert sde.stochastic_steps(kind, schedule, 0.5, "stochastic").all()
        assert not sde.stochastic_steps(kind, schedule, 0.0, "stochastic").any()
    # cps ends without noise whatever is asked for.
    np.testing.assert_array_equal(
        sde.stochastic_steps("cps", schedule, 0.5, "stochastic"), [1, 1, 1, 1, 0]
    )
    none = sde.stochastic_steps("ode", schedule, 0.5, "stochastic")
    assert not none.any()


@pytest.mark.parametrize("kind", sde.KINDS)
def test_eta_zero_is_exactly_the_ode_step(kind):
    rng = np.random.default_rng(0)
    v, x = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    mean, std = jitted_transition(kind, v, x, 0.9, 0.7, 0.0)
    ode, _ = jitted_transition("ode", v, x, 0.9, 0.7, 0.0)
    np.testing.assert_array_equal(mean, ode)
    assert std == 0


@pytest.mark.parametrize("kind", sde.KINDS)
def test_batched_sigma_equals_one_by_one(kind):
    rng = np.random.default_rng(0)
    v, x = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
    sigma = np.float32([1.0, 0.999, 0.5, 0.1])
    sigma_next = np.float32([0.9, 0.998, 0.4, 0.0])
    eta = np.float32([0.5, 0.3, 1.0, 0.0])
    mean, std = jitted_transition(kind, v, x, sigma, sigma_next, eta)
    std = jnp.broadcast_to(std, (4, 1, 1))
    for b in range(4):
        one = jitted_transition(kind, v[b], x[b], sigma[b], sigma_next[b], eta[b])
        np.testing.assert_allclose(mean[b], one.mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(std[b, 0, 0], one.std, rtol=1e-6)


@pytest.mark.parametrize("kind", sde.KINDS)
def test_velocity_sensitivity_is_the_derivative_of_the_mean(kind):
    sigmas = schedules.make_schedule(20, 5.0).sigmas

    @jax.jit
    def derivative(sigma, sigma_next):
        def mean(v):
            return sde.transition(kind, v, jnp.float32(0.3), sigma, sigma_next, 0.5).mean

        return jnp.abs(jax.grad(mean)(jnp.float32(-0.7)))

    want = [derivative(s, n) for s, n in itertools.pairwise(sigmas)]
    got = sde.velocity_sensitivity(kind, sigmas[:-1], sigmas[1:], 0.5)
    np.testing.assert_allclose(got, want, rtol=2e-6)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    kind=st.sampled_from(list(sde.KINDS)),
    num_steps=st.integers(1, 1000),
    shift=st.floats(0.1, 20.0),
    eta=st.floats(0.0, 2.0),
)
def test_never_nan_and_finite_gradients(kind, num_steps, shift, eta):
    eta = eta / 2 if kind == "cps" else eta
    sigmas = np.zeros(1001, np.float32)
    sigmas[: num_steps + 1] = schedules.host_schedule(num_steps, shift).sigmas
    outputs = everything_about_a_chain(kind, sigmas, np.float32(eta))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(outputs))


@functools.partial(jax.jit, static_argnames="kind")
def everything_about_a_chain(kind, sigmas, eta):
    """Means, stds, log-probabilities, all gradients of 1000 steps (the padding is σ = σ' = 0)."""
    x = jnp.linspace(-3.0, 3.0, 1000)

    def total(v, x, sigmas, eta):
        mean, std = sde.transition(kind, v, x, sigmas[:-1], sigmas[1:], eta)
        log_ratio = sde.log_ratio(x, mean, jax.lax.stop_gradient(mean), std)
        values = mean, std, log_ratio, sde.log_prob(mean + std, mean, std)
        return sum(jnp.sum(value) for value in values), values

    return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(-x, x, sigmas, eta)


def test_point_mass_data_has_the_closed_form_excess():
    """Data = one point, v = x/σ: Var - σ'² after 19 of 20 steps is .233·σ'² and .303·σ'²."""
    sigmas = np.asarray(schedules.make_schedule(20, 5.0).sigmas)
    excess = {}
    for kind in sde.KINDS:
        variance = 1.0
        for sigma, sigma_next in itertools.pairwise(sigmas[:-1]):
            mean, std = jitted_transition(
                kind, np.float32([1 / sigma]), np.float32([1.0]), sigma, sigma_next, 0.5
            )
            exact_start = sigma**2 * float(mean[0]) ** 2 + float(std) ** 2
            if kind == "precise":
                s = float(std) ** 2
                formula = s * (1 - sigma_next / sigma) + s**2 / (4 * sigma**2)
                np.testing.assert_allclose(exact_start - sigma_next**2, formula, atol=2e-6)
            variance = variance * float(mean[0]) ** 2 + float(std) ** 2
        excess[kind] = variance / sigma_next**2 - 1
    assert excess["precise"] == pytest.approx(0.233, abs=5e-4)
    assert excess["flow"] == pytest.approx(0.303, abs=5e-4)
    assert excess["ode"] == pytest.approx(0.0, abs=1e-5)
    assert excess["cps"] == pytest.approx(0.0, abs=1e-5)


def gaussian_final_variance(kind, num_steps, eta=0.5, m=0.7, s=0.5, shift=5.0):
    """Mean and variance at σ = 0 for data N(m, s²), from the affine map x -> E[x'] of each step."""
    sigmas = np.asarray(schedules.make_schedule(num_steps, shift).sigmas, np.float64)
    sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
    marginal = (1 - sigma) ** 2 * s**2 + sigma**2
    x = np.array([[0.0, 1.0]])  # two points are enough for an affine map
    centred = x - (1 - sigma) * m
    velocity = centred * (sigma - (1 - sigma) * s**2) / marginal - m
    x = np.broadcast_to(x, velocity.shape)
    mean, std = sde.transition(kind, velocity, x, sigma[:, 0], sigma_next[:, 0], eta)
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)[:, 0]
    expectation, variance = 0.0, 1.0
    for offset, at_one, noise in zip(mean[:, 0], mean[:, 1], std, strict=True):
        expectation = offset + (at_one - offset) * expectation
        variance = (at_one - offset) ** 2 * variance + noise**2
    return expectation, variance


def test_gaussian_data_converges_to_its_marginal_except_for_cps():
    """ode, precise and dance are first order in the step; cps loses variance at any step size."""
    with jax.enable_x64(True):
        for kind in ("ode", "precise", "dance"):
            errors = []
            for num_steps in (200, 400):
                mean, variance = gaussian_final_variance(kind, num_steps)
                errors.append(abs(variance / 0.25 - 1))
                assert mean == pytest.approx(0.7, abs=2e-2)
            assert errors[1] < 0.03
            assert 1.6 < errors[0] / errors[1] < 2.4
        deficits = [1 - gaussian_final_variance("cps", n, s=1.0)[1] for n in (20, 2560)]
        np.testing.assert_allclose(deficits, [0.34, 0.15], atol=6e-3)


def test_cps_variance_deficit_formula():
    """However short the step, cps loses A·B·(1 - cos(η·π/2))²/(A + B) of the true variance."""
    sigma, s, eta = 0.8, 0.6, 0.5
    a, b = (1 - sigma) ** 2 * s**2, sigma**2
    slope = (sigma - (1 - sigma) * s**2) / (a + b)
    with jax.enable_x64(True):
        sigma_next = sigma * (1 - 1e-9)
        mean, std = sde.transition(
            "cps", np.array([slope]), np.array([1.0]), sigma, sigma_next, eta
        )
        variance = float(mean[0]) ** 2 * (a + b) + float(std) ** 2
    deficit = a * b * (1 - np.cos(eta * np.pi / 2)) ** 2 / (a + b)
    assert a + b - variance == pytest.approx(deficit, rel=1e-5)


def test_log_prob_is_the_mean_gaussian_log_density():
    rng = np.random.default_rng(0)
    x, mean = rng.normal(size=(2, 3, 4, 5))
    std = np.array([0.1, 1.0, 3.0])
    want = scipy.stats.norm.logpdf(x, mean, std[:, None, None])
    got = sde.log_prob(x, mean, std)
    np.testing.assert_allclose(got, want.mean((1, 2)), rtol=2e-6)
    got = sde.log_prob(x, mean, std[:, None, None], reduction="sum")
    np.testing.assert_allclose(got, want.sum((1, 2)), rtol=2e-6)
    got = sde.log_prob(x, mean, 0.5, log_prob="squared")
    np.testing.assert_allclose(got, -((x - mean) ** 2).mean((1, 2)), rtol=2e-6)


@pytest.mark.parametrize("form", sde.LOG_PROBS)
def test_log_ratio_is_the_difference_of_log_probs(form):
    """In float64, where the difference is accurate; float32 must agree with it at tiny shifts."""
    rng = np.random.default_rng(0)
    noise, old, shift = rng.normal(size=(3, 3, 4, 5))
    std = np.array([0.05, 0.7, 1.4])
    for size, rtol in ((0.1, 1e-5), (1e-5, 2e-2)):
        new32 = (old + size * shift).astype(np.float32)
        old32 = old.astype(np.float32)
        with jax.enable_x64(True):
            old64, new64 = old32.astype(np.float64), new32.astype(np.float64)
            x = old64 + std[:, None, None] * noise
            want = sde.log_prob(x, new64, std, log_prob=form)
            want -= sde.log_prob(x, old64, std, log_prob=form)
            want = np.asarray(want)
        got = sde.log_ratio(noise.astype(np.float32), new32, old32, std, log_prob=form)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=rtol)


def test_steps_without_noise_have_zero_log_ratio_and_gradient():
    rng = np.random.default_rng(0)
    noise, new, old = rng.normal(size=(3, 2, 4)).astype(np.float32)
    std = np.float32([0.0, 0.5])

    @jax.jit
    def both(new, std):
        ratios = sde.log_ratio(noise, new, old, std), sde.log_prob(noise, new, std)
        return sum(r.sum() for r in ratios), ratios

    (_, ratios), gradients = jax.value_and_grad(both, argnums=(0, 1), has_aux=True)(new, std)
    for ratio in ratios:
        assert ratio[0] == 0
        assert ratio[1] != 0
    for gradient in gradients:
        assert np.all(gradient[0] == 0)
        assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(sde.log_ratio(noise, new, old, 0.0), [0, 0])


def test_bad_input():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"kind='euler': must be one of precise, flow"):
        sde.transition("euler", x, x, 0.9, 0.8, 0.5)
    with pytest.raises(ValueError, match=r"eta=-0\.1"):
        sde.transition("precise", x, x, 0.9, 0.8, -0.1)
    with pytest.raises(ValueError, match=r"eta=1\.5 for kind='cps': must be 0 <= eta <= 1"):
        sde.velocity_sensitivity("cps", 0.9, 0.8, 1.5)
    with pytest.raises(ValueError, match="eta=nan"):
        sde.stochastic_steps("flow", schedules.make_schedule(4, 1.0), float("nan"))
    with pytest.raises(ValueError, match="last_step='noisy'"):
        sde.stochastic_steps("flow", schedules.make_schedule(4, 1.0), 0.5, "noisy")
    with pytest.raises(ValueError, match="log_prob='laplace'"):
        sde.log_ratio(x, x, x, 0.5, log_prob="laplace")
    with pytest.raises(ValueError, match="reduction='max'"):
        sde.log_prob(x, x, 0.5, reduction="max")
    with pytest.raises(ValueError, match="shape"):
        sde.transition("flow", x[None], x[None], jnp.zeros((2, 3)), 0.8, 0.5)


@pytest.mark.parametrize("clamp", [1e-3, 3e-3, 0.03, 0.5])
@pytest.mark.parametrize("kind", sde.KINDS)
def test_a_clamp_keeps_steps_away_from_pure_noise(kind, clamp):
    """1 - σ is replaced by max(1 - σ, clamp) where the variance diverges, and nowhere else."""
    rng = np.random.default_rng(0)
    v, x = rng.normal(size=(2, 2, 3, 4))
    sigmas = np.asarray(schedules.make_schedule(12, 3.0).sigmas, np.float64)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        dt = sigma_next - sigma
        x1 = x + (1 - sigma) * v
        if kind == "precise":
            a, b = max(1 - sigma, clamp), max(1 - sigma_next, clamp)
            variance = 0.25 * (np.log(b / a) - (b - a))
        elif kind == "flow":
            variance = 0.25 * sigma / max(1 - sigma, clamp) * -dt
        else:
            mean, std = textbook_step(kind, v, x, sigma, sigma_next, sigmas[1], 0.5)
        if sde.KINDS[kind].reads_clamp:
            mean, std = x + dt * v - 0.5 * variance * x1 / sigma, np.sqrt(variance)
        found = clamped_transition(kind, v, x, sigma, sigma_next, 0.5, clamp)
        np.testing.assert_allclose(found.mean, mean, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(found.std, std, rtol=1e-4, atol=1e-6)


def test_steps_inside_the_clamp_are_deterministic():
    schedule = schedules.host_schedule(20, 5.0)
    noisy = sde.stochastic_steps("precise", schedule, 0.5, "stochastic", clamp=0.05)
    # A step is inside as long as it ends at or above σ = 0.95.
    np.testing.assert_array_equal(noisy, np.asarray(schedule.sigmas[1:], np.float64) < 0.95)
    assert sde.stochastic_steps("flow", schedule, 0.5, "stochastic", clamp=0.05).all()


@pytest.mark.parametrize("clamp", [-1e-3, 0.6, float("nan")])
def test_bad_clamps(clamp):
    with pytest.raises(ValueError, match=r"clamp=.*: must be 0 to 0\.5"):
        sde.step_coefficients("flow", 0.9, 0.8, 0.5, clamp=clamp)


@pytest.mark.parametrize("kind", kinds.clamped_kinds())
@pytest.mark.parametrize("clamp", [0.0, 0.05])
def test_the_gradient_scale_is_that_of_the_clamped_step(kind, clamp):
    """|dmean/dv| by automatic differentiation over the std, where the clamp acts."""
    step = {"sigma": 0.98, "sigma_next": 0.9, "eta": 0.7, "clamp": clamp}

    def transition(v):
        return sde.transition(kind, v, jnp.float32(0.4), **step)

    slope = abs(jax.grad(lambda v: transition(v)[0])(jnp.float32(0.3)))
    wanted = slope / transition(jnp.float32(0.3))[1]
    assert sde.gradient_scale(kind, **step) == pytest.approx(float(wanted), rel=1e-4)
