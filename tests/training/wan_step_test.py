"""Training steps of a second model: a tiny Wan through the same learner, update and shadow."""

import dataclasses

import jax
import learners
import numpy as np
import pytest
import wan_pair

from sage_grpo_jax.models import registry
from sage_grpo_jax.models.wan import WanConfig
from sage_grpo_jax.models.wan_vae import WanVaeConfig

# As much coarser than its clips as the released one: the small world's clips are 32 pixels wide.
VAE = dataclasses.replace(
    wan_pair.VAE, base_dim=4, dim_mult=(1, 1, 1, 1), temperal_downsample=(False, True, True)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return wan_pair.make_pair(tmp_path_factory.mktemp("wan"), VAE).path


@pytest.fixture
def make_wan_config(make_config, folder):
    """make_wan_config(overrides) -> a recipe that trains the tiny Wan."""
    given = {
        "model.transformer": str(folder / "transformer"),
        "model.vae": str(folder / "vae"),
        "rollout.guidance": 5.0,
        "trust_region.kind": "none",
    }
    return lambda overrides: make_config({**given, **overrides})


# Gradients are compared with those of diffusers in tests/models/wan_parity_test.py, adapters of any
# model are trained in two_experts_test.py; the shadow of a second DiT takes long to compile.
@pytest.mark.parametrize(
    ("rank", "shadowed"),
    [
        (0, False),
        pytest.param(0, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
    ],
)
def test_a_step_trains_it(make_wan_config, local_scorer, one_device, tmp_path, rank, shadowed):
    """Full fine-tuning, also beside the float64 shadow, and adapters."""
    config = make_wan_config({"lora.rank": rank, "debug.shadow": shadowed})
    trainer = learners.make(config, local_scorer(), one_device, tmp_path)
    plan = trainer.learner.plan
    assert isinstance(plan.transformer, WanConfig)
    assert isinstance(plan.vae, WanVaeConfig)
    assert plan.latent_shape == (2, 4, 4, 4)

    before = trainer.params()
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    assert metrics["reward/valid_fraction"] == 1
    assert metrics["ratio/max_deviation"] == 0
    assert all(np.isfinite(value) for value in metrics.values())
    if shadowed:
        assert metrics["shadow/gradient"] < 1e-3
        assert metrics["shadow/log_ratio"] < 1e-4

    names = jax.tree_util.tree_leaves_with_path(before)
    for (path, old), new in zip(names, jax.tree.leaves(trainer.params()), strict=True):
        # The down projections of fresh adapters get no gradient: the up projections are zero.
        if "down" not in jax.tree_util.keystr(path):
            assert np.abs(new - old).max() > 1e-5, jax.tree_util.keystr(path)
    assert registry.kind_of(plan.transformer) == registry.TRANSFORMER
