"""One training step: the ratio gate, masks, skips, meshes."""

import dataclasses

import jax
import learners
import numpy as np
import pytest

from sage_grpo_jax.grpo import trust_region
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import recipe, setup
from sage_grpo_jax.training import update as update_lib


@dataclasses.dataclass
class Trainer:
    """A learner with its state and prompts."""

    learner: learner_lib.Learner
    state: object
    prompts: setup.Prompts

    def steps(self, count: int) -> list[dict[str, float]]:
        """Takes `count` steps."""
        batches, metrics = iter(self.prompts), []
        for _ in range(count):
            self.state, values = self.learner.step(self.state, next(batches))
            metrics.append(values)
        return metrics

    def params(self):
        """The parameters as numpy."""
        return jax.tree.map(np.asarray, self.state.params)


# Where the trust region has no part in what is tested: compiles in half the time.
NO_KL = {"trust_region.kind": "none"}
# Compiled programs by config and devices; what only the host looks at does not compile anew.
_PROGRAMS: dict[tuple, programs_lib.Programs] = {}


def compiled(networks, config, mesh) -> programs_lib.Programs:
    """The programs of a config, compiled once for all tests."""
    loss = dataclasses.replace(
        config.loss, ratio_tolerance=0.0, ratio_action="stop", updates_per_rollout=1
    )
    key = (dataclasses.replace(config, loss=loss), mesh)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = setup.build_programs(networks, config, mesh)
    recipe = dataclasses.replace(_PROGRAMS[key].recipe, config=config)
    return dataclasses.replace(_PROGRAMS[key], recipe=recipe)


def make_trainer(config, scorer, mesh, tmp_path) -> Trainer:
    return Trainer(*learners.make(config, scorer, mesh, tmp_path, compiled))


def test_first_step_starts_at_ratio_one_and_no_divergence(
    make_config, local_scorer, one_device, tmp_path
):
    trainer = make_trainer(make_config(), local_scorer(), one_device, tmp_path)
    before = trainer.params()
    first, second = trainer.steps(2)
    assert first["ratio/max_deviation"] <= 1e-6
    assert second["ratio/max_deviation"] <= 1e-6
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
    rate = {"optimizer.learning_rate": 1e-5}
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
        assert theirs["ratio/max_deviation"] <= 1e-6
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
        samples = batch.repeat(config.rollout.group_size)
        rows = other.learner.sample_keys(batch, 3)
        assert (np.asarray(jax.random.key_data(rows)) == keys).all()
        condition = other.learner.condition(samples)
        sharded = other.learner.programs.rollout(
            other.state.params,
            condition,
            other.learner.frozen,
            rows,
            other.learner.window_starts(batch, 3),
        )
    alone = trainer.learner.programs.rollout(
        trainer.state.params,
        trainer.learner.condition(samples),
        trainer.learner.frozen,
        trainer.learner.sample_keys(batch, 3),
        trainer.learner.window_starts(batch, 3),
    )
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


def test_a_failed_sample_has_no_influence(make_config, local_scorer, one_device, tmp_path):
    """Its latents may even be NaN: loss and gradient are those of the other samples."""
    config = make_config()
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    learner, batch = trainer.learner, next(iter(trainer.prompts))
    samples = batch.repeat(4)
    keys, condition = learner.sample_keys(batch, 0), learner.condition(samples)
    starts = learner.window_starts(batch, 0)
    trajectory = learner.programs.rollout(
        trainer.state.params, condition, learner.frozen, keys, starts
    )
    advantages = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    valid = np.ones(16, bool)
    valid[3] = False

    def norm(latents):
        update = update_lib.UpdateBatch(latents, keys, condition, advantages, valid, starts)
        state = setup.fresh_state(setup.read_networks(config.model), config, one_device)
        _, metrics = learner.programs.update(state, update, learner.frozen, np.float32(1e-6))
        assert metrics["update/applied"]
        return float(metrics["grad/norm"])

    disturbed = trajectory.latents.at[:, 3].set(np.nan)
    assert norm(trajectory.latents) == pytest.approx(norm(disturbed), rel=1e-6)


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


def test_ratio_gate_stops_before_anything_is_applied(
    make_config, local_scorer, one_device, tmp_path
):
    config = make_config({"loss.ratio_tolerance": 0.0})
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    with pytest.raises(learner_lib.NumericsError, match="ratio_tolerance = 0"):
        trainer.steps(1)


def test_replay_brings_the_ratio_back_to_one(make_config, local_scorer, one_device, tmp_path):
    # bf16 in the model makes the update's means differ from the rollout's.
    config = make_config(
        {
            **NO_KL,
            "model.compute_dtype": "bfloat16",
            "loss.ratio_tolerance": 1e-9,
            "loss.ratio_action": "replay",
        }
    )
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    assert metrics["ratio/rollout_mismatch"] > 1e-9
    assert metrics["ratio/max_deviation"] <= 1e-6


def test_several_updates_move_the_ratio(make_config, local_scorer, one_device, tmp_path):
    config = make_config({"loss.updates_per_rollout": 3})
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    (metrics,) = trainer.steps(1)
    assert metrics["ratio/max_deviation"] > config.loss.clip_range
    assert metrics["ratio/clip_fraction"] > 0


def test_the_trust_region_counts_in_elements(make_config, local_scorer, one_device, tmp_path):
    """Summed log-probabilities and KLs are n times the mean; what steers λ is not."""
    config = make_config({"loss.log_prob_reduction": "sum", "optimizer.learning_rate": 1e-4})
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
    networks = setup.read_networks(config.model)
    made = recipe.make_recipe(config, networks.transformer, networks.vae)
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


@pytest.mark.parametrize(
    "method", ["flow_grpo", "dance_grpo", "cps", "sage_official", "sage_paper"]
)
def test_the_other_methods_run(make_config, local_scorer, one_device, tmp_path, method):
    from sage_grpo_jax.training import methods

    config = make_config(methods.METHODS[method])
    trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    assert metrics["ratio/max_deviation"] <= 1e-6
    assert metrics["grad/norm"] > 0
    assert ("kl/anchor" in metrics) == (method in ("flow_grpo", "sage_official", "sage_paper"))
    if method.startswith("sage_"):
        assert trainer.learner.recipe.trained.all()  # the last step too
        # With one update the estimate of Eq. 15 is 0 before it.
        assert abs(metrics["kl/previous"]) <= 1e-7


def test_accumulation_equals_one_batch(make_config, local_scorer, one_device, tmp_path):
    norms = []
    for size in (8, 16):
        config = make_config({"loss.micro_batch": size})
        trainer = make_trainer(config, local_scorer(), one_device, tmp_path)
        (metrics,) = trainer.steps(1)
        norms.append(metrics["grad/norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_guidance_in_batch_equals_in_sequence(make_config, local_scorer, one_device, tmp_path):
    found = []
    for mode in ("batch", "sequential"):
        guidance = {"rollout.guidance": 2.5, "rollout.guidance_mode": mode}
        config = make_config({**NO_KL, **guidance})
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
    samples = batch.repeat(config.rollout.group_size)
    keys = trainer.learner.sample_keys(batch, 0)
    condition = trainer.learner.condition(samples)
    starts = trainer.learner.window_starts(batch, 0)
    ours = trainer.learner.programs.rollout(
        trainer.state.params, condition, trainer.learner.frozen, keys, starts
    )
    theirs = full.learner.programs.rollout(
        full.state.params, condition, full.learner.frozen, keys, starts
    )
    np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-5)
    nothing = jax.tree.map(jax.numpy.zeros_like, trainer.state.params)
    without = trainer.learner.programs.rollout(
        nothing, condition, trainer.learner.frozen, keys, starts
    )
    np.testing.assert_array_equal(ours.latents, without.latents)

    first, second = trainer.steps(2)
    assert first["ratio/max_deviation"] <= 1e-6
    assert second["ratio/max_deviation"] <= 1e-6
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


def test_random_windows_and_shared_initial_noise(make_config, local_scorer, one_device, tmp_path):
    config = make_config(
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
    starts = np.asarray(learner.window_starts(batch, 0))
    assert learner.recipe.window_places == 2
    trajectory = learner.programs.rollout(
        trainer.state.params, learner.condition(batch.repeat(4)), learner.frozen,
        learner.sample_keys(batch, 0), starts,
    )  # fmt: skip
    latents, stds = np.asarray(trajectory.latents), np.asarray(trajectory.stds)
    for b in range(16):
        np.testing.assert_array_equal(np.flatnonzero(stds[:, b]), starts[b] + np.arange(2))
        np.testing.assert_array_equal(latents[0, b], latents[0, b - b % 4])
    # Within a group the samples part where their window starts, and not before.
    for b in range(1, 16, 4):
        start = starts[b]
        np.testing.assert_array_equal(latents[start, b], latents[start, b - 1])
        assert (latents[start + 1, b] != latents[start + 1, b - 1]).any()
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    assert metrics["ratio/max_deviation"] <= 1e-6
    assert metrics["grad/norm"] > 0
