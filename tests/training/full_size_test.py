"""The recipe of the released model, built without memory: shapes, shardings, counts."""

import dataclasses
import importlib.util
import itertools
import math
import pathlib

import jax
import numpy as np
import pytest

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.training.blueprint import Blueprint

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "hunyuan_video_15.py"
PARAMETERS = 8_326_608_160
MEANFLOW_PARAMETERS = 8_331_330_848


@pytest.fixture(scope="module")
def plan():
    """The module configs/hunyuan_video_15.py."""
    spec = importlib.util.spec_from_file_location("full_size", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(plan, arg: str | None) -> schema.Config:
    return builder.from_config_dict(plan.get_config(arg))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh(2, 2, 2)


def test_full_fine_tuning_builds_abstractly(plan, mesh):
    config = make(plan, None)
    video, rollout = config.video, config.rollout
    assert (video.frames, video.height, video.width) == (81, 352, 624)
    assert (rollout.num_steps, rollout.shift, rollout.eta, rollout.guidance) == (20, 5.0, 0.5, 6.0)
    assert (rollout.group_size, rollout.prompts_per_step) == (4, 16)
    blueprint = Blueprint.describe(config, mesh)
    state = blueprint.state
    assert count(state.params) == PARAMETERS
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    # Two moments, anchor and previous.
    assert count(state.opt_state) == pytest.approx(4 * PARAMETERS, abs=1000)
    assert blueprint.base is None
    assert blueprint.plan.latent_shape == (21, 22, 39, 32)
    assert blueprint.plan.trained.sum() == 19
    # What every device holds is about a fourth: fsdp and context are 2 each.
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    assert held < 0.26 * PARAMETERS


def test_lora_trains_adapters_on_a_frozen_base_in_bfloat16(plan, mesh):
    config = make(plan, "lora=64")
    blueprint = Blueprint.describe(config, mesh)
    state = blueprint.state
    # r (4 (D + D) + 2 (D + 4D)) for each of two streams and 54 blocks, D = 2048.
    assert count(state.params) == 54 * 2 * 64 * (4 * 2 * 2048 + 2 * 5 * 2048)
    assert count(state.opt_state) == pytest.approx(4 * count(state.params), abs=1000)
    base = blueprint.base
    assert count(base) == PARAMETERS
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jax.numpy.bfloat16.dtype}
    assert config.learning_rate == 1e-4


def test_every_variant_is_a_valid_recipe(plan):
    for variant, frames in itertools.product(plan.VARIANTS, (81, 121)):
        config = make(plan, f"variant={variant},frames={frames}")
        networks = networks_lib.describe_networks(config.model)
        built = plan_lib.make_plan(config, networks.transformer, networks.vae)
        assert built.latent_shape[0] == (frames + 3) // 4
        meanflow = variant == "480p_i2v_step_distilled"
        assert networks.transformer.use_meanflow == meanflow
    assert count(networks_lib.abstract_params(networks.transformer)) == PARAMETERS
    step_distilled = dataclasses.replace(networks.transformer, use_meanflow=True)
    assert count(networks_lib.abstract_params(step_distilled)) == MEANFLOW_PARAMETERS
    config = make(plan, "size=480x832,frames=121,variant=720p_t2v,method=cps,lora=8")
    assert (config.video.height, config.rollout.sde, config.lora.rank) == (480, "cps", 8)
    assert config.rollout.shift == 9.0


@pytest.mark.parametrize(
    ("arg", "text"),
    [
        ("variant=360p_t2v", "variant: got '360p_t2v'"),
        ("size=352", "size: got '352'"),
        ("frames=many", "frames: got 'many'"),
        ("lora=-1", "lora: got '-1'"),
        ("rank=8", "allowed: variant="),
    ],
)
def test_bad_arguments_are_named(plan, arg, text):
    with pytest.raises(ValueError, match=text):
        plan.get_config(arg)


def test_weights_of_another_variant_are_refused(plan, tiny_networks):
    config = make(plan, "variant=480p_i2v_step_distilled")
    model = dataclasses.replace(
        config.model, transformer=str(tiny_networks / "transformer"), vae=str(tiny_networks / "vae")
    )
    with pytest.raises(ValueError, match="use_meanflow=False"):
        networks_lib.read_networks(model)
