"""The recipe of Wan 2.1, built without memory: the door alone tells it from the other models."""

import importlib.util
import math
import pathlib

import jax
import numpy as np
import pytest

from sage_grpo_jax.config import builder
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.models import wan, wan_vae
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.training import setup

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "wan_21.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("wan_21", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("size", "parameters", "shift"), [("1.3b", 1_418_996_800, 3.0), ("14b", 14_288_491_584, 5.0)]
)
def test_full_fine_tuning_builds_abstractly(recipe, size, parameters, shift):
    config = builder.from_config_dict(recipe.get_config(f"size={size}"))
    video, rollout = config.video, config.rollout
    assert (video.frames, video.height, video.width, video.fps) == (81, 480, 832, 16.0)
    assert (rollout.shift, rollout.guidance) == (shift, 5.0)
    networks = setup.describe_networks(config.model)
    assert isinstance(networks.transformer, wan.WanConfig)
    assert isinstance(networks.vae, wan_vae.WanVaeConfig)
    assert networks.transformer.dtype == networks.vae.dtype == "bfloat16"
    mesh = mesh_lib.make_mesh(2, 2, 2)
    state = setup.make_abstract_state(networks, config, mesh)
    assert count(state.params) == parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert count(state.opt_state) == pytest.approx(4 * parameters, abs=1000)
    # fsdp and context are 2 each: every device holds about a fourth.
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    assert held < 0.26 * parameters
    built = plan_lib.make_plan(config, networks.transformer, networks.vae)
    assert built.latent_shape == (21, 60, 104, 16)


def test_adapters_are_those_of_both_attentions_and_the_mlp(recipe):
    config = builder.from_config_dict(recipe.get_config("lora=16"))
    networks = setup.describe_networks(config.model)
    state = setup.make_abstract_state(networks, config, mesh_lib.make_mesh(2, 2, 2))
    # r (in + out) for four layers of two attentions and two of the MLP, 30 blocks.
    width, hidden = 12 * 128, 8960
    assert count(state.params) == 30 * 16 * (8 * 2 * width + 2 * (width + hidden))


@pytest.mark.parametrize(
    ("arg", "text"),
    [("size=5b", "size: got '5b'"), ("clip=480", "clip: got '480'"), ("lora=-1", "lora: got '-1'")],
)
def test_bad_arguments_are_named(recipe, arg, text):
    with pytest.raises(ValueError, match=text):
        recipe.get_config(arg)


@pytest.mark.parametrize(("arg", "field"), [("clip=488x832", "height"), ("frames=80", "frames")])
def test_clips_that_make_no_whole_tokens_are_refused(recipe, arg, field):
    config = builder.from_config_dict(recipe.get_config(arg))
    networks = setup.describe_networks(config.model)
    with pytest.raises(ValueError, match=rf"config\.video\.{field}: got "):
        plan_lib.make_plan(config, networks.transformer, networks.vae)


def test_prompts_are_filled_up_to_the_length_that_the_model_learned():
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    place = jax.NamedSharding(mesh, jax.P())
    config = wan.WanConfig(text_dim=3)
    rng = np.random.default_rng(0)
    text, mask = rng.standard_normal((2, 7, 3)), np.arange(7) < np.array([[4], [7]])
    batch = conditions.PromptBatch(["a", "b"], ["a", "b"], text, mask)
    condition = conditions.to_condition(batch, place, config, 5)
    assert condition.text.shape == (2, 512, 3)
    np.testing.assert_allclose(condition.text[:, :7], text, rtol=1e-6)
    np.testing.assert_array_equal(condition.text_mask.sum(1), [4, 7])
    assert not condition.text_mask[:, 7:].any()
    negative = jax.tree.map(lambda x: x[1:], condition)
    other = wan.unconditional(condition, negative)
    np.testing.assert_array_equal(other.text, np.stack([condition.text[1]] * 2))
    long = conditions.PromptBatch(["a"], ["a"], np.zeros((1, 513, 3)), np.ones((1, 513), bool))
    with pytest.raises(ValueError, match="text tokens=513: must be at most 512"):
        conditions.to_condition(long, place, config, 5)
