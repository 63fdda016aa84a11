"""Bad input gives one message with field, value and what is allowed."""

import importlib.util
import pathlib
import re

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.common import fields
from sage_grpo_jax.config import builder, methods, schema, step_plan
from sage_grpo_jax.training import workdir

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "moving_shapes.py"


@pytest.fixture(scope="module")
def plan():
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
def test_presets_set_sampler_loss_and_trust_region(plan, method, expected):
    config = builder.from_config_dict(plan.get_config(f"method={method}"))
    found = (
        config.rollout.sde,
        config.loss.equalizer,
        config.trust_region.kind,
        config.loss.log_prob,
    )
    assert (config.method, found) == (method, expected)


def test_overrides_win_over_the_preset(plan):
    config = plan.get_config("method=flow_grpo")
    config.rollout.sde = "precise"
    assert builder.from_config_dict(config).rollout.sde == "precise"


@pytest.mark.parametrize("arg", ["method=ppo", "methd=sage", "sage"])
def test_bad_argument_is_named(plan, arg):
    with pytest.raises(ValueError, match="allowed: "):
        plan.get_config(arg)


@pytest.mark.parametrize(
    ("method", "allowed"),
    [("grpo", "sage_paper, flow_grpo"), ("flow_grpo", "RECIPE.py:method=flow_grpo")],
)
def test_the_name_of_a_method_by_itself_is_refused(plan, method, allowed):
    """It would change the name and none of the values: in code, from a file, as a flag."""
    config = plan.get_config("method=sage")
    with pytest.raises(TypeError, match="field 'method'"):
        config.method = method
    values = ml_collections.ConfigDict(config.to_dict() | {"method": method})
    with pytest.raises(ValueError, match=f"^config.method: got '{method}'.* allowed: .*{allowed}"):
        builder.from_config_dict(values)


def test_the_method_is_no_flag():
    argv = ["train", f"--config={RECIPE}:method=sage", "--config.method=flow_grpo"]
    defined = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=defined, sys_argv=argv)
    with pytest.raises(flags.Error, match=r"config.method: got 'flow_grpo', .*:method=flow_grpo$"):
        defined(argv)


def test_typing_a_wrong_field_fails(plan):
    with pytest.raises(AttributeError, match="etaa"):
        plan.get_config().rollout.etaa = 1.0


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
        ("optimizer.b1", 1.0, "0 to 1, but below 1"),
        ("optimizer.b2", -0.5, "0 to 1"),
        ("rewards.weights.VQ", float("-inf"), "finite"),
        ("rewards.budget_seconds", 0.0, "greater than 0"),
        ("rewards.backend", "video", "moving_shapes, or package.module:Class"),
        ("mesh.fsdp", -2, "at least -1"),
        ("optimizer.momentum", 1.0, "below 1"),
        ("model.variant", "480p", "480p_t2v"),
        ("name", "", "a name"),
        ("trust_region.kl_time_weight", "flat", "uniform, equalized"),
        ("trust_region.fixed_weight", -0.1, "at least 0"),
        ("trust_region.warmup_steps", -1.0, "at least 0"),
        ("rollout.clamp", 0.6, "0 to 0.5"),
        ("rollout.window", "last_k", "random_k, progressive, decay, dynamic"),
        ("rollout.trained_fraction", 0.0, "greater than 0"),
        ("rollout.trained_fraction", 1.5, "0 to 1"),
        ("rollout.trained_choice", "last", "first, random"),
        ("rollout.window_motion.stay", 0, "at least 1"),
        ("rollout.window_motion.rate", -0.5, "at least 0"),
        ("advantage.combine", "mean", "sum, per_reward"),
        ("advantage.std", "prompt", "group, group_unbiased, global"),
        ("loss.objective", "dpo", "ppo, reinforce, nft"),
        ("loss.guidance_gradient", "negative", "both, condition"),
        ("loss.split_updates", True, "at least 2 updates"),
        ("nft.beta", 0.0, "greater than 0"),
        ("nft.decay_limit", 1.0, "below 1"),
        ("nft.decay_rate", -1.0, "at least 0"),
        ("nft.decay_start", -1, "at least 0"),
        ("ema.decay", 1.0, "below 1"),
        ("ema.every", 0, "at least 1"),
        ("eval.weights", "best", "trained, ema"),
        ("eval.weights", "ema", "a decay above 0"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(plan, path, value, allowed):
    config = plan.get_config()
    config.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=allowed) as error:
        builder.from_config_dict(config)
    assert path.split(".")[-1] in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        (
            "dance_grpo",
            {"rollout.clamp": 0.01},
            r"rollout.clamp: got 0.01 with sde='dance', .*flow",
        ),
        ("sage", {"rollout.window": "decay"}, r"window='decay' with window_size=0; .*at least 1"),
        ("flow_grpo", {"loss.updates_per_rollout": 3}, r"got 3 with split_updates; .* the 2 micro"),
        (
            "flow_grpo",
            {"loss.micro_batch": 64},
            r"got 2 with split_updates; .* the 1 micro-batches",
        ),
        ("diffusion_nft", {"loss.equalizer": True}, r"loss.equalizer: got True with .*=nft"),
        ("diffusion_nft", {"rollout.window": "first_k", "rollout.window_size": 3}, "window: got"),
        ("diffusion_nft", {"loss.log_prob_reduction": "sum"}, "log_prob_reduction: got 'sum'"),
        ("diffusion_nft", {"debug.shadow": True}, "debug.shadow: got True"),
        ("diffusion_nft", {"trust_region.kl_time_weight": "equalized"}, "got 'equalized'"),
        (
            "diffusion_nft",
            {"trust_region.kind": "dual", "trust_region.previous_estimator": "log_ratio"},
            "previous_estimator: got 'log_ratio'",
        ),
        (
            "diffusion_nft",
            {"rollout.same_initial_noise": True},
            "same_initial_noise: got True with sde='ode'.* videos of a group equal",
        ),
        ("sage", {"rollout.sde": "ode"}, "or loss.objective=nft"),
    ],
)
def test_fields_that_do_not_go_together(plan, method, overrides, message):
    config = plan.get_config(f"method={method}")
    config.update_from_flattened_dict(overrides)
    with pytest.raises(ValueError, match=r"^config\.") as error:
        builder.from_config_dict(config)
    assert re.search(message, str(error.value))
    assert "allowed: " in str(error.value)


def test_a_share_of_less_than_a_step_is_refused(plan):
    config = plan.get_config("method=dance_grpo")
    config.rollout.update(window="first_k", window_size=1)
    with pytest.raises(
        ValueError, match=r"got 0.6, which is less than one of 1 steps; allowed: at"
    ):
        step_plan.plan_steps(builder.from_config_dict(config))


def test_the_forward_process_takes_any_sampler_and_reference(plan):
    for overrides in (
        {"rollout.sde": "precise", "rollout.same_initial_noise": True},
        {"trust_region.kind": "dual"},
        {"rollout.guidance": 3.0, "loss.guidance_gradient": "condition"},
        {"lora.rank": 4},
    ):
        config = plan.get_config("method=diffusion_nft")
        config.update_from_flattened_dict(overrides)
        assert builder.from_config_dict(config).averages == ("ema", "sampling")


def test_a_fixed_anchor_has_its_own_weight(plan):
    config = plan.get_config()
    config.trust_region.update(kind="fixed", fixed_weight=0.3)
    region = builder.from_config_dict(config).trust_region
    assert (region.initial_weight, region.final_weight, region.feedback) == (0.3, 0.3, "none")
    config.trust_region.kind = "dual"
    assert builder.from_config_dict(config).trust_region.final_weight == 0.1


def test_a_tenth_of_the_clip_range_is_allowed(plan):
    config = plan.get_config()
    config.loss.update(ratio_tolerance=1e-6, clip_range=1e-5)
    assert builder.from_config_dict(config).loss.ratio_tolerance == 1e-6


def test_wrong_type_and_unknown_fields_are_refused():
    values = schema.default_config().to_dict()
    values["rollout"]["group_size"] = True
    with pytest.raises(ValueError, match=r"config.rollout.group_size: got True \(bool\)"):
        fields.build(schema.Config, values, "config")
    values = schema.default_config().to_dict()
    values["rollout"]["beta"] = 1
    with pytest.raises(ValueError, match=r"config.rollout.beta: unknown field"):
        fields.build(schema.Config, values, "config")


def test_cps_takes_eta_up_to_one_only(plan):
    config = plan.get_config("method=cps")
    config.rollout.eta = 1.5
    with pytest.raises(ValueError, match="0 to 1"):
        builder.from_config_dict(config)


def test_manifold_distance_needs_clips_of_the_world(plan):
    config = plan.get_config()
    config.video.frames = 21
    with pytest.raises(ValueError, match=r"got True with clips of \(21, 32, 32\)"):
        builder.from_config_dict(config)


def test_methods_change_only_fields_that_exist():
    known = workdir.flatten(schema.default_config().to_dict())
    for preset in methods.METHODS.values():
        assert set(preset) <= set(known)


def recipe_with(plan, weights):
    """The quick start with other rewards."""
    config = plan.get_config()
    config.rewards.weights = weights
    return config


def test_a_recipe_may_name_any_rewards(plan):
    """A weight of 0 stays: it is monitored."""
    config = recipe_with(plan, {"hps_v2": 2, "aesthetic": 0.5, "TA": 0.0, "VQ": 1.0})
    made = builder.from_config_dict(config)
    assert made.rewards.weights == {"hps_v2": 2.0, "aesthetic": 0.5, "TA": 0.0, "VQ": 1.0}
    assert isinstance(made.rewards.weights["hps_v2"], float)
    assert made.rewards.optimised == {"hps_v2": 2.0, "aesthetic": 0.5, "VQ": 1.0}
    # ConfigDicts sort their names; sums of floats keep the order of old, whatever is added.
    assert list(made.rewards.weights) == ["VQ", "TA", "aesthetic", "hps_v2"]
    again = recipe_with(plan, {"VQ": 1.0, "TA": 0.0, "aesthetic": 0.5, "hps_v2": 2.0})
    assert hash(builder.from_config_dict(again)) == hash(made)
    assert builder.from_config_dict(again) == made
    config.rewards.weights.aesthetic = 0.25  # as a flag does it
    assert builder.from_config_dict(config) != made


def test_rewards_of_the_quick_start_keep_their_order(plan):
    weights = builder.from_config_dict(plan.get_config()).rewards.weights
    assert list(weights.items()) == [("VQ", 1.0), ("MQ", 1.0), ("TA", 1.0)]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, r"rewards.weights: got \(\) for no reward; allowed: one of them not 0"),
        ({"a": 0.0, "b": 0.0}, r"rewards.weights: got \(0.0, 0.0\) for a, b; allowed: one of them"),
        ({"a": float("nan")}, "rewards.weights.a: got nan; allowed: finite"),
        ({"a": "1"}, r"rewards.weights.a: got '1' \(str\); allowed: float"),
        ({"a": True}, r"rewards.weights.a: got True \(bool\); allowed: float"),
        ({"overall": 1.0}, "rewards.weights: got 'overall' as the name of a reward"),
        ({"VQ": 1.0, "vq": 1.0}, ".* which share the metric reward/vq"),
    ],
)
def test_weights_that_are_no_weights_are_refused(plan, weights, said):
    with pytest.raises(ValueError, match=f"^config.{said}"):
        builder.from_config_dict(recipe_with(plan, weights))


def test_weights_that_are_no_mapping_are_refused():
    config = schema.default_config().to_dict()
    config["rewards"]["weights"] = 1.0
    with pytest.raises(ValueError, match=r"config.rewards.weights: got 1.0; allowed: values by"):
        builder.from_config_dict(ml_collections.ConfigDict(config))


def test_a_preset_leaves_the_rewards_of_a_recipe_alone(plan):
    """Its weights are those of VQ, MQ and TA; which rewards there are is the recipe's choice."""
    config = recipe_with(plan, {"aesthetic": 1.0, "MQ": 3.0})
    methods.apply(config, "sage_official")
    assert config.rewards.weights.to_dict() == {"aesthetic": 1.0, "MQ": 0.5}
    with pytest.raises(AttributeError):
        config.rewards.weights.asthetic = 2.0  # a slip of a flag is no new reward


def test_weights_that_are_all_zero_have_nothing_to_optimise(plan):
    config = plan.get_config()
    config.rewards.weights.update(VQ=0.0, MQ=0.0, TA=0.0)
    with pytest.raises(ValueError, match=r"config.rewards.weights: got \(0.0, 0.0, 0.0\)"):
        builder.from_config_dict(config)
