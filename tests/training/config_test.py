"""Bad input gives one message with field, value and what is allowed."""

import importlib.util
import pathlib

import pytest

from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import methods, workdir

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "moving_shapes.py"


@pytest.fixture(scope="module")
def recipe():
    """The module configs/moving_shapes.py."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("sage", ("precise", True, "dual", "gaussian")),
        ("flow_grpo", ("flow", False, "fixed", "gaussian")),
        ("dance_grpo", ("dance", False, "none", "gaussian")),
        ("cps", ("cps", False, "none", "squared")),
    ],
)
def test_presets_set_sampler_loss_and_trust_region(recipe, method, expected):
    config = config_lib.from_config_dict(recipe.get_config(f"method={method}"))
    found = (
        config.rollout.sde,
        config.loss.equalizer,
        config.trust_region.kind,
        config.loss.log_prob,
    )
    assert (config.method, found) == (method, expected)


def test_overrides_win_over_the_preset(recipe):
    config = recipe.get_config("method=flow_grpo")
    config.rollout.sde = "precise"
    assert config_lib.from_config_dict(config).rollout.sde == "precise"


@pytest.mark.parametrize("arg", ["method=ppo", "methd=sage", "sage"])
def test_bad_argument_is_named(recipe, arg):
    with pytest.raises(ValueError, match="allowed: "):
        recipe.get_config(arg)


def test_typing_a_wrong_field_fails(recipe):
    with pytest.raises(AttributeError, match="etaa"):
        recipe.get_config().rollout.etaa = 1.0


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("rollout.sde", "sde", "precise, flow"),
        ("rollout.eta", -0.1, "0 to 2"),
        ("rollout.eta", float("nan"), "0 to 2"),
        ("rollout.eta", 0.0, "eta > 0"),
        ("rollout.sde", "ode", "eta > 0"),
        ("rollout.num_steps", 0, "1 to 1000"),
        ("rollout.shift", 21.0, "0.1 to 20"),
        ("rollout.group_size", 1, "at least 2"),
        ("loss.micro_batch", 7, "divisor"),
        ("rollout.decode_batch", 5, "divisor"),
        ("loss.clip_range", 0.0, "greater than 0"),
        ("loss.ratio_tolerance", 1.1e-05, "at most a tenth of config.loss.clip_range = 0.0001"),
        ("loss.rollout_tolerance", 1.5, "0 to 1"),
        ("loss.ratio_action", "replay", "stop, log"),
        ("optimizer.name", "sgd", "adamw"),
        ("optimizer.learning_rate", float("inf"), "finite"),
        ("rewards.spawn", False, "HOST:PORT"),
        ("rewards.min_valid_fraction", 1.5, "0 to 1"),
        ("trust_region.kind", "trust", "none, fixed"),
        ("num_steps", 0, "at least 1"),
        ("optimizer.b1", 1.0, "below 1"),
        ("optimizer.b2", -0.5, "0 to 1"),
        ("rewards.weights.VQ", float("-inf"), "finite"),
        ("rewards.budget_seconds", 0.0, "greater than 0"),
        ("rewards.backend", "video", "moving_shapes, or package.module:Class"),
        ("mesh.fsdp", -2, "at least -1"),
        ("method", "grpo", "sage_paper, flow_grpo"),
        ("method", "flow_grpo", ":method=flow_grpo"),
        ("optimizer.momentum", 1.0, "below 1"),
        ("model.variant", "480p", "480p_t2v"),
        ("name", "", "a name"),
        ("trust_region.kl_time_weight", "flat", "uniform, equalized"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(recipe, path, value, allowed):
    config = recipe.get_config()
    config.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=allowed) as error:
        config_lib.from_config_dict(config)
    assert path.split(".")[-1] in str(error.value)
    assert str(value) in str(error.value)


def test_a_tenth_of_the_clip_range_is_allowed(recipe):
    config = recipe.get_config()
    config.loss.update(ratio_tolerance=1e-6, clip_range=1e-5)
    assert config_lib.from_config_dict(config).loss.ratio_tolerance == 1e-6


def test_wrong_type_and_unknown_fields_are_refused():
    values = config_lib.default_config().to_dict()
    values["rollout"]["group_size"] = True
    with pytest.raises(ValueError, match=r"config.rollout.group_size: got True \(bool\)"):
        config_lib._build(config_lib.Config, values, "config")
    values = config_lib.default_config().to_dict()
    values["rollout"]["beta"] = 1
    with pytest.raises(ValueError, match=r"config.rollout.beta: unknown field"):
        config_lib._build(config_lib.Config, values, "config")


def test_cps_takes_eta_up_to_one_only(recipe):
    config = recipe.get_config("method=cps")
    config.rollout.eta = 1.5
    with pytest.raises(ValueError, match="0 to 1"):
        config_lib.from_config_dict(config)


def test_manifold_distance_needs_clips_of_the_world(recipe):
    config = recipe.get_config()
    config.video.frames = 21
    with pytest.raises(ValueError, match=r"got True with clips of \(21, 32, 32\)"):
        config_lib.from_config_dict(config)


def test_methods_change_only_fields_that_exist():
    fields = dict(methods.METHODS)
    known = workdir.flatten(config_lib.default_config().to_dict())
    for preset in fields.values():
        assert set(preset) <= set(known)


def test_weights_that_are_all_zero_have_nothing_to_optimise(recipe):
    config = recipe.get_config()
    config.rewards.weights.update(VQ=0.0, MQ=0.0, TA=0.0)
    with pytest.raises(ValueError, match=r"config.rewards.weights: got \(0.0, 0.0, 0.0\)"):
        config_lib.from_config_dict(config)
