"""The table of kinds: what holds for every entry, and that one entry is all that a kind needs."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_modules import import_entry

from sage_grpo_jax.checks import shadow_formulas
from sage_grpo_jax.config import builder, schema, step_plan
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.flow import excess, injected_noise, kinds, noise, rollout, schedules, sde
from sage_grpo_jax.grpo import equalizer
from sage_grpo_jax.sampling import settings as settings_lib

schedule_entry = import_entry("schedule")

SCHEDULE = schedules.host_schedule(8, 3.0)
SIGMAS = np.asarray(SCHEDULE.sigmas, np.float64)


@pytest.mark.parametrize("name", kinds.stochastic_kinds())
def test_eta_of_std_undoes_what_eta_does_to_the_noise(name):
    """At every step, for stds up to nearly that of the largest η."""
    highest = min(kinds.KINDS[name].highest_eta, sde.HIGHEST_ETA)

    def stds(eta):
        found = sde.step_coefficients(name, SIGMAS[:-1], SIGMAS[1:], eta, xp=np).std
        return found[found > 0]

    for eta in (0.1 * highest, 0.5 * highest, 0.95 * highest):
        found = [kinds.KINDS[name].eta_of_std(share) for share in stds(eta) / stds(1.0)]
        np.testing.assert_allclose(found, eta, rtol=1e-9)


def test_a_kind_without_eta_one_is_refused():
    with pytest.raises(ValueError, match=r"highest_eta=0\.5: must be at least 1"):
        kinds.Kind(kinds.KINDS["dance"].coefficients, highest_eta=0.5)


# Another kind: the noise x̂1 is exchanged for fresh noise such that their variances add up, with a
# std in proportion to η: mean = (1 - σ')·x̂0 + σ'·√(1 - η²/4)·x̂1, std = σ'·η/2.


def exchanged(sigma, sigma_next, eta, clamp, xp):
    del sigma, clamp
    kept = xp.sqrt(1.0 - eta**2 / 4.0)
    return kinds.StepCoefficients(sigma_next * (1.0 - kept), std=sigma_next * eta / 2.0)


@pytest.fixture
def exchange(monkeypatch):
    """One entry, and nothing else."""
    monkeypatch.setitem(kinds.KINDS, "exchange", kinds.Kind(exchanged, highest_eta=1.5))


def make_config(**values) -> schema.Config:
    config = schema.default_config()
    config.rollout.update(num_steps=8, shift=3.0, sde="exchange", eta=0.6)
    config.update_from_flattened_dict(values)
    return builder.from_config_dict(config)


def test_one_entry_is_a_transition(exchange):
    rng = np.random.default_rng(0)
    v, x = rng.standard_normal((2, 2, 3, 4))
    for sigma, after in itertools.pairwise(SIGMAS):
        with jax.enable_x64(True):
            mean, std = sde.transition("exchange", v, x, sigma, after, 0.6)
        clean, predicted = x - sigma * v, x + (1 - sigma) * v
        want = (1 - after) * clean + after * math.sqrt(1 - 0.3**2) * predicted
        np.testing.assert_allclose(mean, want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(std, 0.3 * after, rtol=1e-12)
    with pytest.raises(ValueError, match=r"eta=1\.6 for kind='exchange': must be 0 <= eta <= 1\.5"):
        sde.transition("exchange", x, x, 0.9, 0.8, 1.6)


def test_one_entry_is_a_sampler(exchange):
    """Data at the point 0, v = x/σ: the variance is that of the marginals, whatever η."""
    noisy = sde.stochastic_steps("exchange", SCHEDULE, 1.2)
    np.testing.assert_array_equal(noisy, [1] * 7 + [0])
    # The last step ends at σ = 0, without noise whatever is asked for.
    assert not sde.stochastic_steps("exchange", SCHEDULE, 1.2, "stochastic")[-1]
    np.testing.assert_allclose(
        excess.point_mass("exchange", SCHEDULE, 1.2, noisy).excess, 0, atol=1e-12
    )

    keys = noise.sample_keys(0, 0, 0, np.arange(4096, dtype=np.uint32), np.zeros(4096, int))
    made = rollout.rollout(
        lambda x, t: 1000.0 * x / t[:, None], keys, (2,), SCHEDULE, "exchange", 1.2, noisy
    )
    np.testing.assert_allclose(np.std(made.latents[1:-1], axis=(1, 2)), SIGMAS[1:-1], rtol=0.05)
    np.testing.assert_allclose(made.stds[:-1], 0.6 * SIGMAS[1:-1], rtol=1e-6)


@pytest.mark.parametrize("log_prob", sde.LOG_PROBS)
def test_one_entry_is_a_gradient_scale(exchange, log_prob):
    """N_t by automatic differentiation of the log-probability; the weights even it out."""

    def log_density(v, sigma, after):
        mean, std = sde.transition("exchange", v, jnp.ones(1), sigma, after, 0.6)
        return sde.log_prob(jax.lax.stop_gradient(mean + std), mean, std, log_prob=log_prob)[0]

    steps = jnp.asarray(SIGMAS[:-2], jnp.float32), jnp.asarray(SIGMAS[1:-1], jnp.float32)
    slopes = jax.vmap(jax.grad(log_density), (None, 0, 0))(jnp.ones(1), *steps)
    factor = 1 if log_prob == "gaussian" else 2
    scale = equalizer.gradient_scale("exchange", SCHEDULE, 0.6, log_prob=log_prob)
    np.testing.assert_allclose(np.abs(slopes)[:, 0], factor * scale[:-1], rtol=1e-4)

    trained = np.arange(8) < 7
    weights = equalizer.equalizer_weights("exchange", SCHEDULE, 0.6, trained, log_prob=log_prob)
    shares = (np.asarray(weights) * scale)[:-1]
    np.testing.assert_allclose(shares, np.median(scale[:-1]), rtol=1e-6)


def test_one_entry_is_a_choice_of_recipes(exchange):
    config = make_config()
    weights = plan_lib.step_weights(config, step_plan.plan_steps(config))
    wanted = equalizer.equalizer_weights("exchange", SCHEDULE, 0.6, np.arange(8) < 7)
    np.testing.assert_array_equal(weights, wanted)
    with pytest.raises(
        ValueError, match=r"rollout.eta: got 1.6; allowed with sde=exchange: 0 to 1.5"
    ):
        make_config(**{"rollout.eta": 1.6})
    with pytest.raises(ValueError, match=r"rollout.clamp: got 0.1 with sde='exchange'"):
        make_config(**{"rollout.clamp": 0.1})
    with pytest.raises(ValueError, match=r"--eta: got 1.6; allowed: 0 to 1.5"):
        settings_lib.from_config(config, sampler="exchange", eta=1.6)


def test_one_entry_has_a_matched_eta(exchange):
    """Of another kind, and another kind's: the same sum of variances."""
    matched = make_config(**{"rollout.eta_match.kind": "dance", "rollout.eta_match.eta": 0.3})
    assert np.sum((SIGMAS[1:-1] * matched.rollout.eta / 2) ** 2) == pytest.approx(
        0.3**2 * np.sum(SIGMAS[:-2] - SIGMAS[1:-1])
    )
    back = make_config(
        **{
            "rollout.sde": "dance",
            "rollout.eta_match.kind": "exchange",
            "rollout.eta_match.eta": matched.rollout.eta,
        }
    )
    assert back.rollout.eta == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"kind='exchange' injects a variance of at most"):
        injected_noise.matched_eta("exchange", SCHEDULE, "flow", 2.0)


def test_one_entry_is_in_the_schedule(exchange):
    values = schedule_entry.describe(make_config())
    assert values["sde"] == "exchange"
    np.testing.assert_allclose(values["std"], [*(0.3 * SIGMAS[1:-1]), 0])
    np.testing.assert_allclose(values["share"][:-1], 1 / 7, rtol=1e-5)


def test_the_shadow_refuses_what_it_has_no_formula_for(exchange):
    with pytest.raises(ValueError, match=r"^config.debug.shadow: got True with rollout.sde='exch"):
        shadow_formulas.check(make_config())
    shadow_formulas.check(make_config(**{"rollout.sde": "cps"}))
    with pytest.raises(ValueError, match=r"kind='exchange': must be one of precise, flow, dance"):
        shadow_formulas.variance("exchange", 0.9, 0.8, 0.5)
