"""The recipe of the released Wan 2.1 models, built without memory: shapes, shardings, counts."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.training.blueprint import Blueprint

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "wan_21.py"
# Variant: parameters, width, hidden width of the MLPs, blocks, shift.
SIZES = {
    "1.3B": (1_418_996_800, 1536, 8960, 30, 3.0),
    "14B": (14_288_491_584, 5120, 13824, 40, 5.0),
}
VAE_PARAMETERS = 126_892_531


@pytest.fixture(scope="module")
def recipe():
    """The module configs/wan_21.py."""
    spec = importlib.util.spec_from_file_location("wan_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh(2, 2, 2)


def make(recipe, arg: str | None) -> schema.Config:
    return builder.from_config_dict(recipe.get_config(arg))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def parameters_of_diffusers(model, config) -> int:
    with torch.device("meta"):
        theirs = model.from_config(json.loads(config.to_json()))
    return sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("variant", SIZES)
def test_full_fine_tuning_builds_abstractly(recipe, mesh, variant):
    config = make(recipe, f"variant={variant}")
    parameters, *_, shift = SIZES[variant]
    video, rollout = config.video, config.rollout
    assert (video.frames, video.height, video.width, video.fps) == (81, 480, 832, 16.0)
    assert (rollout.num_steps, rollout.shift, rollout.guidance) == (20, shift, 5.0)
    blueprint = Blueprint.describe(config, mesh)
    networks, state = blueprint.networks, blueprint.state
    assert networks.transformer.dtype == networks.vae.dtype == "bfloat16"
    assert count(state.params) == parameters
    assert parameters_of_diffusers(WanTransformer3DModel, networks.transformer) == parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    # Two moments, anchor and previous.
    assert count(state.opt_state) == pytest.approx(4 * parameters, abs=1000)
    assert blueprint.plan.latent_shape == (21, 60, 104, 16)
    assert blueprint.plan.trained.sum() == 19
    # What every device holds is about a fourth: fsdp and context are 2 each.
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    assert held < 0.26 * parameters


def test_the_vae_is_that_of_diffusers(recipe):
    networks = networks_lib.describe_networks(make(recipe, None).model)
    assert count(networks_lib.abstract_params(networks.vae)) == VAE_PARAMETERS
    assert parameters_of_diffusers(AutoencoderKLWan, networks.vae) == VAE_PARAMETERS


@pytest.mark.parametrize("variant", SIZES)
def test_lora_trains_adapters_on_a_frozen_base_in_bfloat16(recipe, mesh, variant):
    config = make(recipe, f"variant={variant},lora=64")
    parameters, width, hidden, blocks, _ = SIZES[variant]
    blueprint = Blueprint.describe(config, mesh)
    state = blueprint.state
    # r (8 (D + D) + 2 (D + F)) in each block: two attentions of four layers, and the MLP.
    assert count(state.params) == blocks * 64 * (8 * 2 * width + 2 * (width + hidden))
    base = blueprint.base
    assert count(base) == parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jax.numpy.bfloat16.dtype}
    assert config.learning_rate == 1e-4


def test_sizes_and_methods_are_valid_recipes(recipe):
    config = make(recipe, "variant=14B,size=720x1280,frames=121,method=cps,lora=8")
    networks = networks_lib.describe_networks(config.model)
    built = plan_lib.make_plan(config, networks.transformer, networks.vae)
    assert built.latent_shape == (31, 90, 160, 16)
    assert (config.rollout.sde, config.lora.rank, config.rollout.shift) == ("cps", 8, 5.0)


@pytest.mark.parametrize(("arg", "field"), [("size=488x832", "height"), ("frames=80", "frames")])
def test_clips_that_make_no_whole_tokens_are_refused(recipe, arg, field):
    config = make(recipe, arg)
    networks = networks_lib.describe_networks(config.model)
    with pytest.raises(ValueError, match=rf"config\.video\.{field}: got "):
        plan_lib.make_plan(config, networks.transformer, networks.vae)


@pytest.mark.parametrize(
    ("arg", "text"),
    [
        ("variant=5B", "variant: got '5B'; allowed: 1.3B, 14B"),
        ("size=480", "size: got '480'"),
        ("frames=many", "frames: got 'many'"),
        ("lora=-1", "lora: got '-1'"),
        ("rank=8", "allowed: variant="),
    ],
)
def test_bad_arguments_are_named(recipe, arg, text):
    with pytest.raises(ValueError, match=text):
        recipe.get_config(arg)


def test_weights_of_another_model_or_size_are_refused(recipe, tiny_networks, tmp_path):
    config = make(recipe, "variant=14B")
    vae = str(tiny_networks / "vae")
    other = dataclasses.replace(
        config.model, transformer=str(tiny_networks / "transformer"), vae=vae
    )
    with pytest.raises(ValueError, match=r"variant=wan_21_t2v_14B is a Wan 2.1 DiT"):
        networks_lib.read_networks(other)
    small = networks_lib.describe_networks(make(recipe, None).model).transformer
    (tmp_path / "config.json").write_text(small.to_json())
    other = dataclasses.replace(config.model, transformer=str(tmp_path), vae=vae)
    with pytest.raises(ValueError, match=r"num_attention_heads=12 in .* is not that of"):
        networks_lib.read_networks(other)
