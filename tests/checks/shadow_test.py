"""The float64 shadow: wide arithmetic, tiny deviations on a healthy run, faults noticed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import learners
import numpy as np
import pytest
import small_policy

from sage_grpo_jax.checks import shadow, shadow_formulas
from sage_grpo_jax.flow import schedules, sde
from sage_grpo_jax.grpo import loss, trust_region
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import micro_losses
from sage_grpo_jax.training import update as update_lib


def some_batch(case: learners.Trainer) -> update_lib.UpdateBatch:
    """One rollout as the update would see it, a fifth of it without a reward."""
    prompts = next(iter(case.prompts))
    valid = np.random.default_rng(0).random(case.learner.config.batch_size) < 0.8
    return case.update_batch(prompts, case.rollout(prompts).latents, valid=valid)


@pytest.fixture
def make_case(make_config, local_scorer, tmp_path):
    """make_case(overrides) -> trainer on one device (or a mesh), with the shadow on."""
    one = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def make(overrides=None, mesh=one, recipe=make_config) -> learners.Trainer:
        config = recipe({"debug.shadow": True, **(overrides or {})})
        return learners.make(config, local_scorer(), mesh, tmp_path)

    with jax.set_mesh(one):
        yield make


@pytest.fixture
def make_small_case(make_case, make_small_config, monkeypatch):
    """The same with a small policy in place of the DiT, for what comes after the velocity."""
    small_policy.install_in_small_network(monkeypatch)
    return functools.partial(make_case, recipe=make_small_config)


def assert_tiny(metrics):
    """Rounding of float32, and not exactly 0: two different computations."""
    assert 0 < metrics["shadow/log_ratio"] < 2e-6
    assert 0 < metrics["shadow/loss"] < 1e-6
    assert 0 < metrics["shadow/gradient"] < 1e-4


def test_the_transformer_hardly_deviates(make_case):
    case = make_case({"trust_region.kind": "none"})
    assert_tiny(case.learner._check(case.state, some_batch(case), case.learner.frozen))


def test_a_healthy_run_hardly_deviates(make_small_case):
    case = make_small_case()
    batches = iter(case.prompts)
    for _ in range(2):  # the second step has divergences from its references
        case.state, metrics = case.learner.step(case.state, next(batches))
        assert metrics["update/applied"] == 1
        assert_tiny(metrics)


@pytest.mark.slow
def test_a_mesh_of_eight_devices(make_small_case):
    mesh = mesh_lib.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        case = make_small_case({"trust_region.kind": "none"}, mesh)
        assert_tiny(case.learner._check(case.state, some_batch(case), case.learner.frozen))


def test_the_shadow_is_off_by_default(make_case):
    assert make_case({"debug.shadow": False}).learner._check is None


def no_weights(policy_loss, log_ratio, advantages, weights, *args, **kwargs):
    """A policy loss that forgets the equalizer."""
    return policy_loss(log_ratio, advantages, jnp.ones_like(weights), *args, **kwargs)


def biased_ratio(log_ratio, noise, mean_new, mean_old, std, **kwargs):
    """A log-ratio whose value is right at ratio 1, and whose gradient is 5 % too long."""
    return log_ratio(noise, mean_old + 1.05 * (mean_new - mean_old), mean_old, std, **kwargs)


@pytest.fixture
def check(make_case, monkeypatch):
    """check(recipe) -> deviations of the update's side compiled anew, at the second step of a run.

    The mask, λ and the KLs all count there.
    """
    small_policy.install(monkeypatch)  # with as many parameters as the DiT the KLs count for more
    case = make_case({"trust_region.initial_weight": 0.5, "trust_region.final_weight": 0.5})
    case.steps(1)
    batch, checker = some_batch(case), case.learner._check

    def run(plan=case.learner.plan):
        checker._float32 = jax.jit(functools.partial(shadow._float32_side, plan))
        return checker(case.state, batch, case.learner.frozen)

    run.plan = case.learner.plan
    return run


def test_a_wrong_loss_is_noticed(check, monkeypatch):
    assert_tiny(check())
    with monkeypatch.context() as patch:
        patch.setattr(loss, "policy_loss", functools.partial(no_weights, loss.policy_loss))
        found = check()
        assert found["shadow/loss"] > 1e-3  # a healthy one is near 1e-8
        assert found["shadow/gradient"] > 0.1
    with monkeypatch.context() as patch:
        patch.setattr(sde, "log_ratio", functools.partial(biased_ratio, sde.log_ratio))
        found = check()
        assert found["shadow/log_ratio"] < 2e-6
        assert 0.02 < found["shadow/gradient"] < 0.1
    with monkeypatch.context() as patch:
        patch.setattr(micro_losses, "_step_factor", lambda plan: 1.01)
        assert 4e-3 < check()["shadow/gradient"] < 0.02


def test_wrong_weights_of_steps_are_noticed(check):
    for name in ("weights", "kl_weights"):
        values = np.array(getattr(check.plan, name))
        changed = dataclasses.replace(check.plan, **{name: 1.05 * values})
        assert check(changed)["shadow/gradient"] > 1e-3, name


def test_what_is_taken_from_the_run_is_not_believed(check, monkeypatch):
    """Normaliser, λ, mask, samples and steps are worked out again."""
    inputs, take = update_lib.loss_inputs, update_lib.take_micro_batch
    size = check.plan.config.batch_size

    def whole_batch(plan, state, frozen, count):
        return inputs(plan, state, frozen, size)

    def larger_weight(plan, state, frozen, count):
        found = inputs(plan, state, frozen, count)
        return found._replace(kl_weight=1.05 * found.kl_weight)

    def no_mask(*args):
        found = take(*args)
        return found._replace(counts=jax.numpy.ones_like(found.counts))

    def other_samples(plan, batch, position, piece):
        return take(plan, batch, position, 1 - piece)

    def next_step(plan, batch, position, piece):
        return take(plan, batch, position + 1, piece)

    faults = {"loss_inputs": (whole_batch, larger_weight)}
    faults["take_micro_batch"] = (no_mask, other_samples, next_step)
    for name, wrong in faults.items():
        for fault in wrong:
            with monkeypatch.context() as patch:
                patch.setattr(update_lib, name, fault)
                assert check()["shadow/gradient"] > 1e-3, fault.__name__


@pytest.mark.parametrize("feedback", ["tighten", "paper", "none"])
def test_lambda_follows_the_measured_kls(feedback):
    """λ of the shadow is that of the optimizer for 40 updates; a second shadow joins in between."""
    settings = trust_region.TrustRegionConfig(
        kind="moving",
        initial_weight=0.1,
        final_weight=1.0,
        warmup_steps=5,
        min_weight=0.3,
        max_weight=1.5,
        target_shift=0.02,
        history=4,
        feedback=feedback,
    )
    transform, params = trust_region.trust_region(settings), {"w": jnp.zeros(3)}
    state = transform.init(params)
    first, late = (shadow_formulas.Controller(settings) for _ in range(2))
    rng, weights = np.random.default_rng(0), []

    def of(controller):
        history = np.asarray(state.history)
        return controller.weight(int(state.count), history, float(state.weight))

    for n in range(40):
        if n % 2 == 0:  # two updates a rollout
            weights.append(float(state.weight))
            assert of(first) == pytest.approx(weights[-1], rel=1e-6)
            if n >= 20:
                assert of(late) == pytest.approx(weights[-1], rel=1e-6)
        kl = np.float32(2e-4 * np.exp(rng.standard_normal() + np.sin(n / 5)))
        _, state = transform.update({"w": jnp.ones(3)}, state, params, kl=kl)
    assert len(set(weights)) > 3
    # A run whose λ is something else is found out, whatever the run says.
    wrong = first.weight(int(state.count), np.asarray(state.history), 7.0)
    assert wrong == pytest.approx(float(state.weight), rel=1e-6)


def test_the_other_settings_agree_too(make_small_case):
    case = make_small_case(
        {
            "rollout.sde": "flow",
            "rollout.guidance": 2.5,
            "rollout.window": "random_k",
            "rollout.window_size": 2,
            "loss.objective": "reinforce",
            "loss.log_prob": "squared",
            "loss.log_prob_reduction": "sum",
            "loss.step_reduction": "sum",
            "trust_region.kind": "dual",
            "trust_region.previous_estimator": "log_ratio",
            "trust_region.initial_weight": 0.5,
            "trust_region.final_weight": 0.5,
            "trust_region.kl_time_weight": "equalized",
        }
    )
    batch = some_batch(case)

    def is_region(node):
        return isinstance(node, trust_region.TrustRegionState)

    def move_anchor(node):
        if not is_region(node):
            return node
        return node._replace(anchor=jax.tree.map(lambda x: x + 0.02, node.anchor))

    opt_state = jax.tree.map(move_anchor, case.state.opt_state, is_leaf=is_region)
    state = case.state._replace(opt_state=opt_state)
    found = case.learner._check(state, batch, case.learner.frozen)
    # A sum over the 320 elements of a sample instead of their mean.
    assert 0 < found["shadow/log_ratio"] < 320 * 2e-6
    assert found["shadow/loss"] < 2e-5
    assert found["shadow/gradient"] < 1e-4


@pytest.mark.parametrize("kind", ["precise", "flow", "dance", "cps"])
def test_textbook_transitions(kind):
    schedule = schedules.host_schedule(20, 5.0)
    rng = np.random.default_rng(0)
    velocity, sample = rng.standard_normal((2, 1, 6))
    with jax.enable_x64(True):
        for sigma, sigma_next in zip(schedule.sigmas[:-2], schedule.sigmas[1:-1], strict=True):
            sigmas = np.float64(sigma), np.float64(sigma_next)
            mean, std = shadow_formulas.transition(kind, velocity, sample, *sigmas, 0.5)
            ours = sde.transition(kind, jnp.asarray(velocity), jnp.asarray(sample), *sigmas, 0.5)
            np.testing.assert_allclose(std, ours.std, rtol=1e-10)
            np.testing.assert_allclose(mean, ours.mean, rtol=1e-10, atol=1e-10)
