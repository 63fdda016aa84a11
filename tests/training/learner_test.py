"""One training step: the ratio gate, masks, skips, meshes."""

import jax
import learners
import numpy as np
import optax
import pytest

from sage_grpo_jax.config import methods
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.grpo import trust_region
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.training import ratio

BASELINES = ("flow_grpo", "dance_grpo", "cps", "diffusion_nft", "sage_official", "sage_paper")
# Where the trust region has no part in what is tested: compiles in half the time.
NO_KL = {"trust_region.kind": "none"}


def make_trainer(config, scorer, mesh, tmp_path) -> learners.Trainer:
    return learners.make(config, scorer, mesh, tmp_path, learners.compiled)


def test_first_step_starts_at_ratio_one_and_no_divergence(
    make_config, local_scorer, one_device, tmp_path
):
    trainer = make_trainer(make_config(), local_scorer(), one_device, tmp_path)
    before = trainer.params()
    first, second = trainer.steps(2)
    assert first["ratio/max_deviation"] == 0
    assert second["ratio/max_deviation"] == 0
    assert first["kl/anchor"] <= 1e-12
    assert first["kl/previous"] <= 1e-12
    # One applied update behind: the second step sees the motion of the first.
    assert second["kl/previous"] > 1e-9
    assert first["update/applied"] == 1
    assert first["grad/norm"] > 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, trainer.params())
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_mesh_does_not_change_the_training(make_config, local_scorer, one_device, tmp_path):
    # Adam turns the rounding of a gradient near 0 into a whole step: a small rate keeps it small.
    # The trust region on a mesh is in loop_test.py.
    rate = {**NO_KL, "optimizer.learning_rate": 1e-5}
    trainer = make_trainer(make_config(rate), local_scorer(), one_device, tmp_path / "one")
    metrics = trainer.steps(2)
    mesh = mesh_lib.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        config = make_config({**rate, "mesh.data": 2, "mesh.fsdp": 2, "mesh.context": 2})
        sharded = make_trainer(config, local_scorer(), mesh, tmp_path / "eight")
        spread = [len(x.sharding.device_set) for x in jax.tree.leaves(sharded.state.params)]
        assert set(spread) == {8}
        assert any(not x.is_fully_replicated for x in jax.tree.leaves(sharded.state.opt_state))
        sharded_metrics = sharded.steps(2)
    for ours, theirs in zip(metrics, sharded_metrics, strict=True):
        # A pixel that rounds the other way moves a reward, and with it the advantages, a little.
        for name, tolerance in (("reward/overall", 1e-4), ("grad/norm", 2e-3)):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance)
        assert theirs["ratio/max_deviation"] == 0
    for a, b in zip(
        jax.tree.leaves(trainer.params()), jax.tree.leaves(sharded.params()), strict=True
    ):
        assert np.mean(np.abs(a - b)) <= 0.02 * 1e-5


def test_mesh_draws_the_same_noise(make_config, local_scorer, one_device, tmp_path):
    config = make_config()
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    batch = next(iter(trainer.prompts))
    keys = np.asarray(jax.random.key_data(trainer.learner.sample_keys(batch, 3)))
    mesh = mesh_lib.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        other = make_trainer(config, local_scorer(), mesh, tmp_path)
        rows = other.learner.sample_keys(batch, 3)
        assert (np.asarray(jax.random.key_data(rows)) == keys).all()
        sharded = other.rollout(batch, step=3)
    alone = trainer.rollout(batch, step=3)
    ours, theirs = np.asarray(alone.latents), np.asarray(sharded.latents)
    # The initial noise is bit for bit the same, the videos within float32 rounding.
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_failed_samples_are_masked_and_counted(make_config, local_scorer, one_device, tmp_path):
    scorer = local_scorer(failing=frozenset({1, 6}))
    trainer = make_trainer(make_config(), scorer, one_device, tmp_path)
    (metrics,) = trainer.steps(1)
    assert metrics["reward/valid_fraction"] == 14 / 16
    assert metrics["advantage/nonzero_fraction"] <= 14 / 16
    assert metrics["update/applied"] == 1
    assert np.isfinite(metrics["reward/overall"])


def gradient(state) -> list[np.ndarray]:
    """The leaves of the gradient of the first update, from Adam's first moment."""
    moments = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
    return [np.asarray(leaf, np.float64) / 0.1 for leaf in moments]


def assert_same_leaves(found, wanted, tolerance: float) -> None:
    """Every leaf to `tolerance` of its own largest number, down to the rounding of the largest.

    The keys' biases cancel in the softmax: their gradient is 0 but for rounding.
    """
    rounding = 1e-7 * max(np.abs(theirs).max() for theirs in wanted)
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        limit = tolerance * np.abs(theirs).max() + rounding
        assert np.abs(ours - theirs).max() <= limit, place


def test_a_failed_sample_has_no_influence(make_small_config, local_scorer, one_device, tmp_path):
    """Whatever its latents and advantage are: the gradient is the mean over the other samples."""
    config = make_small_config({**NO_KL, "optimizer.grad_clip": 1e6})
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    batch = next(iter(trainer.prompts))
    latents = trainer.rollout(batch).latents
    advantages = np.random.default_rng(0).standard_normal(16)
    failed = np.arange(16) == 3

    def gradient_of(latents, valid, advantages):
        update = trainer.update_batch(batch, latents, advantages, valid)
        state = jax.tree.map(jax.numpy.copy, trainer.state)
        state, metrics = trainer.learner.update(state, update)
        assert metrics["update/applied"]
        return gradient(state)

    everyone = gradient_of(latents, np.ones(16, bool), advantages)
    alone = gradient_of(latents, failed, advantages)
    # Means over 16, 15 and 1 samples.
    wanted = [(16 * a - b) / 15 for a, b in zip(everyone, alone, strict=True)]
    assert_same_leaves(gradient_of(latents, ~failed, advantages), wanted, 1e-4)
    broken, absurd = latents.at[:, 3].set(np.nan), np.where(failed, 1e6, advantages)
    assert_same_leaves(gradient_of(broken, ~failed, absurd), wanted, 1e-4)
    for ours, theirs in zip(everyone, wanted, strict=True):  # it did count
        assert np.abs(ours - theirs).max() > 0.01 * np.abs(theirs).max()


def test_too_few_rewards_skip_the_update(make_config, local_scorer, one_device, tmp_path):
    scorer = local_scorer(failing=frozenset(range(6)))
    trainer = make_trainer(make_config(), scorer, one_device, tmp_path)
    before = trainer.params()
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 0
    assert int(trainer.state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, trainer.params())


def test_non_finite_weights_never_move(make_config, local_scorer, one_device, tmp_path, caplog):
    trainer = make_trainer(make_config(), local_scorer(), one_device, tmp_path)
    leaves, tree = jax.tree.flatten(trainer.state.params)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(np.nan)
    trainer.state = trainer.state._replace(params=jax.tree.unflatten(tree, leaves))
    before = trainer.params()
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 0
    assert metrics["reward/valid_fraction"] == 0
    assert "16 samples that are not finite" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, before, trainer.params())


def test_the_gate_stops_before_anything_is_applied(make_config, local_scorer, one_device, tmp_path):
    config = make_config({"loss.rollout_tolerance": 1e-12})
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    with pytest.raises(ratio.NumericsError, match="rollout_tolerance = 1e-12"):
        trainer.steps(1)


def test_several_updates_move_the_ratio(make_small_config, local_scorer, one_device, tmp_path):
    config = make_small_config({"loss.updates_per_rollout": 3})
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    (metrics,) = trainer.steps(1)
    assert metrics["ratio/max_deviation"] > config.loss.clip_range
    assert metrics["ratio/clip_fraction"] > 0


def test_the_trust_region_counts_in_elements(make_small_config, local_scorer, one_device, tmp_path):
    """Summed log-probabilities and KLs are n times the mean; what steers λ is not."""
    config = make_small_config({"loss.log_prob_reduction": "sum", "optimizer.learning_rate": 1e-4})
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    first, second = trainer.steps(2)
    assert first["update/applied"] == second["update/applied"] == 1
    elements = 2 * 4 * 4 * 4
    history = trust_region.find_state(trainer.state.opt_state).history
    assert second["kl/total"] > 0
    np.testing.assert_allclose(history[1], second["kl/total"] / elements, rtol=1e-6)


def test_equalized_kl_weighs_steps_by_their_sensitivity(make_config, local_scorer):
    """Per unit of velocity every step costs the same: w_t·N_t² is one number."""
    config = make_config({"trust_region.kl_time_weight": "equalized", "loss.log_prob": "squared"})
    networks = networks_lib.read_networks(config.model)
    made = plan_lib.make_plan(config, networks.transformer, networks.vae)
    sigmas = np.asarray(made.schedule.sigmas, np.float64)
    costs = []
    for sigma, after, weight in zip(sigmas, sigmas[1:], made.kl_weights, strict=False):
        if after == 0:
            assert weight == 0  # not trained
            continue
        start, end = max(1 - sigma, 3e-3), max(1 - after, 3e-3)
        variance = config.rollout.eta**2 * (np.log(end / start) - (end - start))
        sensitivity = abs(after - sigma - variance / 2 * (1 - sigma) / sigma)
        costs.append(weight * sensitivity**2 / variance)
    np.testing.assert_allclose(costs, costs[0], rtol=1e-5)
    assert sorted(made.kl_weights[made.trained])[1] == pytest.approx(1)  # of the three


@pytest.mark.parametrize("method", BASELINES)
def test_the_other_methods_run(make_small_config, local_scorer, one_device, tmp_path, method):
    config = make_small_config(methods.METHODS[method])
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    # With two updates the metrics are those of the second, which has moved away from ratio 1.
    moved = metrics.get("ratio/max_deviation", 0) > 0
    assert moved == (config.loss.updates_per_rollout == 2)
    assert metrics["grad/norm"] > 0
    assert metrics["reward/group_std"] > 0
    assert ("kl/anchor" in metrics) == (config.trust_region.kind != "none")
    assert (trainer.state.ema is not None) == ("ema" in config.averages)
    assert ("nft/sampling_distance" in metrics) == (method == "diffusion_nft")
    if method.startswith("sage_"):
        assert trainer.learner.plan.trained.all()  # the last step too
        # With one update the estimate of Eq. 15 is 0 before it.
        assert abs(metrics["kl/previous"]) <= 1e-7


def test_accumulation_equals_one_batch(make_small_config, local_scorer, one_device, tmp_path):
    found = []
    for size in (8, 16):
        config = make_small_config({**NO_KL, "loss.micro_batch": size, "optimizer.grad_clip": 1e6})
        trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
        (metrics,) = trainer.steps(1)
        assert metrics["advantage/nonzero_fraction"] == 1
        found.append(gradient(trainer.state))
    assert_same_leaves(found[0], found[1], 1e-4)


def test_guidance_in_batch_equals_in_sequence(
    make_small_config, local_scorer, one_device, tmp_path
):
    found = []
    for mode in ("batch", "sequential"):
        guidance = {"rollout.guidance": 2.5, "rollout.guidance_mode": mode}
        config = make_small_config({**NO_KL, **guidance})
        trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
        (metrics,) = trainer.steps(1)
        found.append([metrics[n] for n in ("reward/overall", "grad/norm")])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


def test_adapters_train_and_leave_the_base_alone(make_config, local_scorer, one_device, tmp_path):
    targets = "query,key,value,proj,mlp/in,mlp/out,text_refiner/blocks/value,final/proj"
    config = make_config({"lora.rank": 2, "lora.targets": targets})
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    full = make_trainer(make_config(), local_scorer(), one_device, tmp_path / "full")
    base = jax.tree.map(np.asarray, trainer.learner.frozen.base)
    jax.tree.map(np.testing.assert_array_equal, base, full.params())
    before, batch = trainer.params(), next(iter(trainer.prompts))
    # Fresh adapters are the base: bit for bit in the model (tests/models/lora_test.py), within the
    # rounding of two programs in a rollout.
    ours = trainer.rollout(batch)
    np.testing.assert_allclose(ours.latents, full.rollout(batch).latents, atol=1e-5)
    without = trainer.rollout(batch, jax.tree.map(jax.numpy.zeros_like, trainer.state.params))
    np.testing.assert_array_equal(ours.latents, without.latents)

    first, second = trainer.steps(2)
    assert first["ratio/max_deviation"] == 0
    assert second["ratio/max_deviation"] == 0
    assert first["kl/anchor"] <= 1e-12
    assert second["kl/previous"] > 1e-12
    assert first["update/applied"] == second["update/applied"] == 1
    jax.tree.map(np.testing.assert_array_equal, base, trainer.learner.frozen.base)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, trainer.params())
    assert min(jax.tree.leaves(moved)) > 0
    # Optimizer and trust region hold adapters only: two moments, anchor, previous, each as large.
    adapters = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    held = sum(x.size for x in jax.tree.leaves(trainer.state.opt_state))
    assert 4 * adapters <= held <= 4 * adapters + 100
    assert adapters < 0.2 * sum(x.size for x in jax.tree.leaves(base))


def test_random_windows_and_shared_initial_noise(
    make_small_config, local_scorer, one_device, tmp_path
):
    config = make_small_config(
        {
            **NO_KL,
            "rollout.window": "random_k",
            "rollout.window_size": 2,
            "rollout.same_initial_noise": True,
            "loss.objective": "reinforce",
            "loss.step_reduction": "sum",
            "loss.equalizer": False,
        }
    )
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    learner, batch = trainer.learner, next(iter(trainer.prompts))

    # Noise where the window is, one start for a group
    starts = np.asarray(learner.window_starts(batch, 0))
    assert learner.plan.steps.window_places == 2
    trajectory, group = trainer.rollout(batch), config.rollout.group_size
    latents, stds = np.asarray(trajectory.latents), np.asarray(trajectory.stds)
    for b in range(16):
        np.testing.assert_array_equal(np.flatnonzero(stds[:, b]), starts[b] + np.arange(2))
        np.testing.assert_array_equal(latents[0, b], latents[0, b - b % group])

    # Within a group the samples part where their window starts, and not before.
    for b in range(1, 16, group):
        start = starts[b]
        np.testing.assert_array_equal(latents[start, b], latents[start, b - 1])
        assert (latents[start + 1, b] != latents[start + 1, b - 1]).any()
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    assert metrics["ratio/max_deviation"] == 0
    assert metrics["grad/norm"] > 0
