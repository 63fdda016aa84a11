"""What a run is built from: each part made once, and arrays that lie as the shapes say."""

import dataclasses

import jax
import numpy as np
import pytest

from sage_grpo_jax import weights
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import optimizers
from sage_grpo_jax.training.blueprint import Blueprint

LORA = {"lora.rank": 2, "lora.alpha": 4.0}


def described(tree):
    """Shapes, dtypes and places."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)


@pytest.fixture
def eight():
    mesh = mesh_lib.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        yield mesh


def test_every_part_is_made_once(make_config, one_device, monkeypatch):
    made = []
    original = optimizers.make_optimizer
    monkeypatch.setattr(
        optimizers, "make_optimizer", lambda config: made.append(config) or original(config)
    )
    blueprint = Blueprint.read(make_config(LORA), one_device)
    for name in ("plan", "optimizer", "state", "base"):
        assert getattr(blueprint, name) is getattr(blueprint, name)
    assert len(made) == 1
    # A changed recipe is another blueprint, with parts of its own.
    other = dataclasses.replace(blueprint, config=make_config({"rollout.num_steps": 3}))
    assert other.plan.schedule.sigmas.shape == (4,)
    assert other.base is None


@pytest.mark.parametrize("overrides", [{}, LORA, {"ema.decay": 0.9}], ids=["full", "lora", "ema"])
def test_the_fresh_state_is_what_the_shapes_say(make_config, eight, overrides):
    blueprint = Blueprint.read(make_config(overrides), eight)
    state = blueprint.fresh_state()
    assert described(state) == described(blueprint.state)
    assert (state.ema is None) == ("ema.decay" not in overrides)
    assert int(state.step) == 0
    base = blueprint.load_base()
    assert (base is None) == (overrides is not LORA)
    assert described(base) == described(blueprint.base)


def test_the_policy_of_a_recipe_is_the_weights_that_it_names(
    make_config, tiny_networks, one_device
):
    full = Blueprint.read(make_config(), one_device)
    wanted = weights.load(tiny_networks / "transformer", full.networks.transformer)
    params, adapters = full.load_policy()
    assert adapters is None
    for found in (params, full.fresh_state().params):
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == np.float32
    # The frozen weights under adapters are in the compute dtype, or as the recipe says.
    for dtype in ("auto", "bfloat16"):
        overrides = {**LORA, "lora.base_dtype": dtype}
        base, adapters = Blueprint.read(make_config(overrides), one_device).load_policy()
        assert adapters is None
        expected = np.dtype("float32") if dtype == "auto" else jax.numpy.bfloat16.dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {expected}


def test_a_run_that_is_not_there_has_no_policy(make_config, one_device, tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        Blueprint.read(make_config(), one_device).load_policy(tmp_path)


def test_networks_that_are_not_here_can_be_described(make_config, one_device):
    config = make_config()
    absent = dataclasses.replace(config.model, transformer="absent", variant="480p_t2v")
    config = dataclasses.replace(config, model=absent)
    with pytest.raises(ValueError, match=r"^config\.model\.transformer: got 'absent'"):
        Blueprint.read(config, one_device)
    assert Blueprint.describe(config, one_device).networks.transformer.num_layers == 54
