"""The policy that the ratio is taken to, the distance of the rollout from it, and the gate."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import learners
import numpy as np
import pytest

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.flow import noise
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.training import ratio, workdir
from sage_grpo_jax.training import update as update_lib

NO_KL = {"trust_region.kind": "none"}


@pytest.fixture
def make_trainer(make_config, local_scorer, one_device, tmp_path):
    """make_trainer(overrides) -> trainer on one device."""

    def make(overrides):
        config = make_config({**NO_KL, **overrides})
        return learners.make(config, local_scorer(), one_device, tmp_path, learners.compiled)

    return make


@pytest.fixture
def make_small_trainer(make_small_config, local_scorer, one_device, tmp_path):
    """make_small_trainer(overrides) -> trainer without a DiT."""

    def make(overrides):
        config = make_small_config({**NO_KL, **overrides})
        return learners.make(config, local_scorer(), one_device, tmp_path, learners.compiled)

    return make


@pytest.fixture
def make_plan(make_config):
    def make(overrides):
        config = make_config({**NO_KL, **overrides})
        networks = networks_lib.read_networks(config.model)
        return plan_lib.make_plan(config, networks.transformer, networks.vae)

    return make


def log_density(x, mean, std, *, squared: bool):
    """Of every element, but for constants; float64."""
    density = -((x - mean) ** 2)
    return density if squared else density / (2 * std**2)


@pytest.mark.parametrize("log_prob", ["gaussian", "squared"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mismatch_of_the_steps(make_plan, log_prob, reduction):
    """The largest |ratio - 1| and distance of each step, from densities in float64."""
    plan = make_plan({"loss.log_prob": log_prob, "loss.log_prob_reduction": reduction})
    rng = np.random.default_rng(0)
    step = np.array([0, 2, 2, 0, 2, 1])
    valid = np.array([True, True, True, True, False, False])
    shape = (6, *plan.latent_shape)
    rollout_mean, draw = rng.standard_normal((2, *shape))
    std = np.array([0.5, 0.2, 0.2, 0.5, 0.2, 0.3]).reshape(-1, 1, 1, 1, 1)
    mean = rollout_mean + std * 0.01 * rng.standard_normal(shape)
    x = rollout_mean + std * draw
    mean[4], x[5] = np.nan, np.nan

    found = jax.jit(lambda *a: ratio.mismatch(plan, *a))(
        *(step, valid, *(jnp.asarray(a, jnp.float32) for a in (draw, mean, x, std)))
    )

    squared = log_prob == "squared"
    log_ratio = log_density(x, mean, std, squared=squared)
    log_ratio -= log_density(x, rollout_mean, std, squared=squared)
    axes = (1, 2, 3, 4)
    log_ratio = log_ratio.sum(axes) if reduction == "sum" else log_ratio.mean(axes)
    deviation = np.abs(np.expm1(log_ratio))
    shift = np.sqrt((((mean - rollout_mean) / std) ** 2).mean(axes))
    for values, largest in ((found.ratio, deviation), (found.shift, shift)):
        wanted = [max(largest[0], largest[3]), -np.inf, max(largest[1], largest[2]), -np.inf]
        np.testing.assert_allclose(values, wanted, rtol=2e-3)

    metrics = ratio.mismatch_metrics(found)
    assert metrics["ratio/rollout_mismatch"] == np.max(found.ratio)
    assert metrics["ratio/rollout_shift"] == np.max(found.shift)
    each = np.asarray(metrics["ratio/rollout_mismatch/step"])
    np.testing.assert_array_equal(np.isnan(each), [False, True, False, True])


def test_what_is_not_finite_is_never_in_tolerance(make_plan):
    plan = make_plan({})
    shape = (2, *plan.latent_shape)
    mean = jnp.zeros(shape).at[0, 0, 0, 0, 0].set(jnp.nan)
    step, valid = jnp.array([0, 1]), jnp.ones(2, bool)
    found = ratio.mismatch(
        plan, step, valid, jnp.zeros(shape), mean, jnp.zeros(shape), jnp.float32(0.1)
    )
    more = jax.tree.map(jnp.maximum, ratio.no_mismatch(plan), found)
    metrics = ratio.mismatch_metrics(more)
    assert np.isnan(metrics["ratio/rollout_mismatch"])
    assert not metrics["ratio/rollout_shift"] <= np.inf


NAN = float("nan")


@pytest.mark.parametrize(
    ("deviation", "shift", "passes"),
    [
        (0.0, 0.0, True),
        (1e-6, 1e-3, True),  # as much as is allowed
        (2e-6, 0.0, False),
        (0.0, 2e-3, False),
        (NAN, 0.0, False),
        (0.0, NAN, False),
    ],
)
def test_the_limits_hold_for_the_first_update_alone(deviation, shift, passes):
    metrics = {"ratio/max_deviation": deviation, "ratio/rollout_shift": shift}
    metrics = {name: jnp.float32(value) for name, value in metrics.items()}
    limits = ratio.Tolerances(np.float32(1e-6), np.float32(1e-3))
    assert bool(ratio.in_tolerance(metrics, limits, None)) == passes
    first, later = (ratio.OldMeans(None, jnp.int32(turn)) for turn in (0, 1))
    assert bool(ratio.in_tolerance(metrics, limits, first)) == passes
    assert bool(ratio.in_tolerance(metrics, limits, later))


def rollout_means(trainer, batch, trajectory) -> np.ndarray:
    """x' - std·ε of the trained steps, float64 [K, B, ...]."""
    plan, keys = trainer.learner.plan, trainer.learner.sample_keys(batch, 0)
    means = []
    for t in np.flatnonzero(plan.trained):
        draw = np.asarray(noise.step_noise(keys, t, plan.latent_shape), np.float64)
        after = np.asarray(trajectory.latents[t + 1]).reshape(draw.shape)
        means.append(after - np.asarray(trajectory.stds[t]) * draw)
    return np.stack(means)


def in_order(plan, values: np.ndarray) -> np.ndarray:
    """[K, B, ...] -> [N, m, ...], the order in which the update goes through them."""
    size = plan.config.loss.micro_batch
    pieces = [np.asarray(update_lib.split_batch(v, size)) for v in values]
    return np.concatenate(pieces)


def test_later_updates_use_the_means_of_the_first(make_small_trainer):
    trainer = make_small_trainer({"loss.updates_per_rollout": 2})
    learner, batch = trainer.learner, next(iter(trainer.prompts))
    trajectory = trainer.rollout(batch)
    update_batch = trainer.update_batch(batch, trajectory.latents)
    limits = ratio.Gate.of(learner.config).limits

    def update(state, old):
        state, metrics, old = learner.programs.update(
            jax.tree.map(jnp.copy, state), update_batch, learner.frozen, limits, old
        )
        return state, jax.device_get(metrics), jax.tree.map(np.array, old)

    def known(old):
        return jax.tree.map(jnp.asarray, old)

    second, metrics, first_means = update(trainer.state, learner.programs.no_means())
    assert metrics["ratio/max_deviation"] <= 1e-7
    assert bool(first_means.known)
    wanted = in_order(learner.plan, rollout_means(trainer, batch, trajectory))
    np.testing.assert_allclose(first_means.means, wanted, atol=2e-5)

    _, later, kept = update(second, known(first_means))
    np.testing.assert_array_equal(kept.means, first_means.means)
    # The means of the second policy, as a first pass of its own would record them; its rollout is
    # another policy's, so that pass must not be applied.
    _, refused, second_means = update(second, learner.programs.no_means())
    assert not refused["update/applied"]
    assert later["update/applied"]

    # The ratios between the two, in float64
    stds = np.asarray(trajectory.stds)[learner.plan.trained]
    delta = (second_means.means.astype(np.float64) - first_means.means) / np.repeat(
        stds, len(kept.means) // len(stds)
    ).reshape(-1, 1, 1, 1, 1, 1)
    keys = learner.sample_keys(batch, 0)
    steps = np.flatnonzero(learner.plan.trained)
    shape = learner.plan.latent_shape
    draws = in_order(learner.plan, np.stack([noise.step_noise(keys, t, shape) for t in steps]))
    log_ratio = (draws * delta - delta**2 / 2).mean((2, 3, 4, 5))

    assert later["ratio/max_deviation"] > learner.config.loss.clip_range
    np.testing.assert_allclose(
        later["ratio/max_deviation"], np.abs(np.expm1(log_ratio)).max(), rtol=2e-3
    )
    clipped = np.mean(np.abs(np.expm1(log_ratio)) > learner.config.loss.clip_range)
    assert later["ratio/clip_fraction"] == pytest.approx(clipped, abs=1.5 / log_ratio.size)


def test_recorded_means_of_windows_and_masked_samples(make_small_trainer):
    """NaN latents of a failed sample stay out, also where samples train at different steps."""
    window = {"rollout.window": "random_k", "rollout.window_size": 2}
    trainer = make_small_trainer({**window, "loss.updates_per_rollout": 2})
    batch = next(iter(trainer.prompts))
    latents = trainer.rollout(batch).latents.at[:, 5].set(jnp.nan)
    valid = np.arange(trainer.learner.config.batch_size) != 5
    update_batch = trainer.update_batch(batch, latents, valid=valid)
    before = trainer.params()
    state, metrics = trainer.learner.update(trainer.state, update_batch)
    assert metrics["update/applied"] == 1
    assert metrics["ratio/rollout_shift"] < 1e-4
    assert metrics["ratio/max_deviation"] > 1e-6  # of the second update
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, state.params)
    assert np.isfinite(jax.tree.leaves(moved)).all()


def other_noise(trainer, batch):
    """The rollout of the next step, with the keys of this one."""
    return trainer.rollout(batch, step=1)


def stale_parameters(trainer, batch):
    """The rollout of parameters of which one has moved by a learning rate of the quick start."""
    moved = jax.tree.map(lambda x: x + 5e-4 * jnp.sign(x), trainer.state.params)
    return trainer.rollout(batch, moved)


@pytest.mark.parametrize(
    ("dtype", "spoil"),
    [
        pytest.param("float32", other_noise, marks=pytest.mark.slow),
        ("float32", stale_parameters),
        ("bfloat16", other_noise),
    ],
)
def test_a_rollout_of_something_else_is_refused(make_trainer, dtype, spoil):
    trainer = make_trainer({"model.compute_dtype": dtype})
    learner, batch = trainer.learner, next(iter(trainer.prompts))
    good = trainer.update_batch(batch, trainer.rollout(batch).latents)
    bad = trainer.update_batch(batch, spoil(trainer, batch).latents)
    limits = ratio.Gate.of(learner.config).limits

    def copied():
        return jax.tree.map(jnp.copy, trainer.state)

    state, metrics, _ = learner.programs.update(copied(), bad, learner.frozen, limits, None)
    assert not metrics["update/applied"]
    assert metrics["ratio/max_deviation"] == 0  # the rollout alone tells
    jax.tree.map(np.testing.assert_array_equal, trainer.params(), state.params)
    with pytest.raises(ratio.NumericsError, match=r"config\.loss\.rollout_tolerance = "):
        learner.update(copied(), bad)
    _, metrics = learner.update(copied(), good)
    assert metrics["update/applied"] == 1


def test_log_applies_and_says_so(make_trainer, caplog):
    trainer = make_trainer({"loss.ratio_action": "log"})
    batch = next(iter(trainer.prompts))
    bad = trainer.update_batch(batch, other_noise(trainer, batch).latents)
    _, metrics = trainer.learner.update(trainer.state, bad)
    assert metrics["update/applied"] == 1
    assert 1.2 < metrics["ratio/rollout_shift"] < 1.8  # √2 but for the few elements of a sample
    assert "ratio_action=log: applied" in caplog.text


def test_limits_by_precision(make_config):
    def limits(**values):
        names = {name.replace("__", "."): value for name, value in values.items()}
        return [float(x) for x in ratio.Gate.of(make_config(names)).limits]

    assert limits() == pytest.approx([1e-6, 1e-3])
    assert limits(model__compute_dtype="bfloat16") == pytest.approx([1e-6, 0.5])
    assert limits(model__matmul_precision="default") == pytest.approx([1e-6, 0.5])
    assert limits(loss__rollout_tolerance=0.1, loss__ratio_tolerance=0.0) == pytest.approx([0, 0.1])
    # A sum over elements does not loosen them.
    assert limits(loss__log_prob_reduction="sum") == limits()
    assert limits(loss__ratio_action="log") == [np.inf, np.inf]


def test_the_gate_says_what_was_refused_and_why(caplog):
    gate = ratio.Gate(ratio=1e-6, shift=1e-3, applies_anyway=False)

    def values(deviation, shift, applied):
        return {
            "ratio/max_deviation": deviation,
            "ratio/rollout_shift": shift,
            "update/ratio_in_tolerance": float(applied),
        }

    gate.check(values(0.0, 1e-4, True))
    assert not caplog.records
    for found, said in (
        (values(2e-6, 1e-4, False), r"^before .* off 1 by 2.00e-06 .*ratio_tolerance = 1e-06"),
        (values(0.0, 0.5, False), r"^the rollout's means lie 5.00e-01 .*rollout_tolerance = 0.001"),
        (values(2e-6, 0.5, False), r"^the rollout's means"),
        (values(float("nan"), 0.0, False), "the model's output is not finite"),
        (values(0.0, float("inf"), False), "the model's output is not finite"),
    ):
        with pytest.raises(ratio.NumericsError, match=said):
            gate.check(found)
    anyway = ratio.Gate(ratio=1e-6, shift=1e-3, applies_anyway=True)
    anyway.check(values(2e-6, 0.5, True))  # a warning, see above
    with pytest.raises(ratio.NumericsError, match="not finite"):
        anyway.check(values(float("nan"), 0.0, False))


def test_an_old_workdir_goes_on_or_is_refused_in_one_line(make_config, tmp_path):
    config = make_config()
    values = dataclasses.asdict(config)
    del values["loss"]["rollout_tolerance"]  # younger than the run
    values["applied_method"] = values["method"]  # no longer a field
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "config.json").write_text(json.dumps(values))
    workdir.claim(config, tmp_path)

    values["loss"] |= {"ratio_action": "replay", "ratio_tolerance": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"loss.ratio_action \('replay' there, 'stop' here\)") as e:
        workdir.claim(config, tmp_path)
    assert "\n" not in str(e.value)
    again = schema.default_config()
    again.update_from_flattened_dict({"loss.ratio_action": "replay"})
    with pytest.raises(ValueError, match="ratio_action: got 'replay'; allowed: stop, log"):
        builder.from_config_dict(again)
