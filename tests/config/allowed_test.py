"""Every field of a config says what it may hold, and what is outside is refused by its name.

The table is the reference: it is written by hand, and the cases are made from its words.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import typing

import pytest

from sage_grpo_jax.common import checked_json, fields
from sage_grpo_jax.common.frozen_dict import FrozenDict
from sage_grpo_jax.config import builder, methods, schema
from sage_grpo_jax.models import registry

ANYTHING = "anything"
POSITIVE = "greater than 0 and finite"
BELOW_ONE = "0 to 1, but below 1"
SEED = f"0 to {2**32 - 1}"

# What a field may hold besides its type; truth values may hold both.
ALLOWED = {
    "name": "a name for the run",
    "method": ", ".join(methods.METHODS),
    "seed": SEED,
    "num_steps": "at least 1",
    "model.transformer": ANYTHING,
    "model.vae": ANYTHING,
    "model.variant": f"{', '.join(registry.variants())}, or ''",
    "model.compute_dtype": "float32, bfloat16",
    "model.matmul_precision": "highest, high, default",
    "model.attention": "auto, splash, cudnn, xla",
    "model.vae_tiling": "off, diffusers, official",
    "video.frames": "at least 1",
    "video.height": "at least 1",
    "video.width": "at least 1",
    "video.fps": POSITIVE,
    "data.train_prompts": ANYTHING,
    "data.eval_prompts": ANYTHING,
    "data.test_prompts": ANYTHING,
    "data.text_encoder": "words, cache",
    "data.max_text_tokens": "at least 0",
    "rollout.sde": "precise, flow, dance, cps, ode",
    "rollout.eta": "0 to 2.0",
    "rollout.eta_match.kind": "precise, flow, dance, cps, or ''",
    "rollout.eta_match.eta": "0 to 2.0",
    "rollout.clamp": "0 to 0.5",
    "rollout.window": "all, first_k, random_k, progressive, decay, dynamic",
    "rollout.window_size": "0 to 1000",
    "rollout.window_motion.stay": "at least 1",
    "rollout.window_motion.stride": "at least 1",
    "rollout.window_motion.least_stay": "at least 1",
    "rollout.window_motion.threshold": "at least 0",
    "rollout.window_motion.rate": "at least 0",
    "rollout.trained_fraction": "0 to 1, but greater than 0",
    "rollout.trained_choice": "first, random",
    "rollout.num_steps": "1 to 1000",
    "rollout.shift": "0.1 to 20",
    "rollout.guidance": "at least 0",
    "rollout.guidance_mode": "batch, sequential",
    "rollout.last_step": "deterministic, stochastic",
    "rollout.prompts_per_step": "at least 1",
    "rollout.group_size": "at least 2",
    "rollout.decode_batch": "at least 1",
    "rewards.backend": ANYTHING,
    "rewards.address": ANYTHING,
    "rewards.timeout_seconds": POSITIVE,
    "rewards.budget_seconds": POSITIVE,
    "rewards.max_in_flight": "at least 1",
    "rewards.silence_seconds": "at least 0",
    "rewards.min_valid_fraction": "0 to 1",
    "rewards.max_skipped_updates": "at least 1",
    "rewards.weights": "finite",
    "advantage.epsilon": "at least 0",
    "advantage.clip": POSITIVE,
    "advantage.std_floor": "at least 0",
    "advantage.std": "group, group_unbiased, global",
    "advantage.combine": "sum, per_reward",
    "loss.objective": "ppo, reinforce, nft",
    "loss.clip_range": POSITIVE,
    "loss.median": "lower, mean",
    "loss.log_prob": "gaussian, squared",
    "loss.log_prob_reduction": "mean, sum",
    "loss.step_reduction": "mean, sum",
    "loss.updates_per_rollout": "at least 1",
    "loss.guidance_gradient": "both, condition",
    "loss.micro_batch": "at least 1",
    "loss.ratio_tolerance": "at least 0",
    "loss.rollout_tolerance": "0 to 1",
    "loss.ratio_action": "stop, log",
    "nft.beta": POSITIVE,
    "nft.decay_start": "at least 0",
    "nft.decay_rate": "at least 0",
    "nft.decay_limit": BELOW_ONE,
    "trust_region.kind": "none, fixed, stepwise, moving, dual, fixed_stepwise",
    "trust_region.anchor_every": "at least 1",
    "trust_region.anchor_weight": "at least 0",
    "trust_region.previous_weight": "at least 0",
    "trust_region.fixed_weight": "at least 0",
    "trust_region.initial_weight": "at least 0",
    "trust_region.final_weight": "at least 0",
    "trust_region.warmup_steps": "at least 0",
    "trust_region.min_weight": "at least 0",
    "trust_region.max_weight": "finite",
    "trust_region.target_shift": POSITIVE,
    "trust_region.feedback": "tighten, paper, none",
    "trust_region.history": "at least 1",
    "trust_region.high": "finite",
    "trust_region.low": "at least 0",
    "trust_region.up": "at least 1",
    "trust_region.down": "0 to 1, but greater than 0",
    "trust_region.previous_estimator": "closed_form, log_ratio",
    "trust_region.kl_time_weight": "uniform, equalized, step_length",
    "trust_region.reference_dtype": "float32, bfloat16",
    "trust_region.step_bound": "at least 0",
    "optimizer.name": "adamw, muon",
    "optimizer.learning_rate": POSITIVE,
    "optimizer.warmup_steps": "at least 0",
    "optimizer.schedule": "constant, linear, cosine",
    "optimizer.final_fraction": "0 to 1",
    "optimizer.momentum": BELOW_ONE,
    "optimizer.newton_schulz_steps": "1 to 20",
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": "at least 0",
    "optimizer.grad_clip": POSITIVE,
    "ema.decay": BELOW_ONE,
    "ema.every": "at least 1",
    "lora.rank": "at least 0",
    "lora.alpha": "at least 0",
    "lora.targets": ANYTHING,
    "lora.init": ANYTHING,
    "lora.base_dtype": "auto, float32, bfloat16",
    "lora.learning_rate": "at least 0",
    "eval.every": "at least 0",
    "eval.weights": "trained, ema",
    "eval.num_prompts": "at least 1",
    "eval.num_test_prompts": "at least 0",
    "eval.samples_per_prompt": "at least 1",
    "eval.num_steps": "1 to 1000",
    "eval.seed": SEED,
    "eval.sheet_prompts": "at least 0",
    "checkpoint.every": "at least 1",
    "checkpoint.keep": "at least 1",
    "mesh.data": "at least -1",
    "mesh.fsdp": "at least -1",
    "mesh.context": "at least -1",
}


def leaves(cls=schema.Config, prefix=""):
    """Path -> (field, type) of every field that is no group of fields."""
    found, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field, hints[field.name]
    return found


LEAVES = leaves()
FLAGS = [path for path, (_, hint) in LEAVES.items() if hint is bool]
TEXTS = [path for path, (_, hint) in LEAVES.items() if hint is str]
CHOICES = [path for path in TEXTS if ALLOWED.get(path) not in (ANYTHING, ALLOWED["name"])]
NUMBERS = [path for path, (_, hint) in LEAVES.items() if hint in (int, float)]


def test_every_field_says_what_it_may_hold():
    """A new field without bound, choices or a reason is seen here, and a bound that is changed."""
    said = {}
    for path, (field, hint) in LEAVES.items():
        rule = fields.rule_of(field)
        if hint is bool:
            assert rule is None
            continue
        assert rule is not None, f"config.{path} has neither a bound, choices nor a reason"
        said[path] = rule.allowed
        if isinstance(rule, fields.Free):
            assert len(rule.reason.split()) >= 3, path
        else:
            assert isinstance(rule, fields.Choices) == (path in CHOICES)
    assert said == ALLOWED
    assert LEAVES["rewards.weights"][1] == FrozenDict[str, float]
    assert len(LEAVES) == len(FLAGS) + len(TEXTS) + len(NUMBERS) + 1


def refusal(path, value):
    """What is said of the default recipe with another value; empty where it is taken."""
    values = schema.default_config().to_dict()
    *groups, name = path.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[name] = value
    try:
        fields.build(schema.Config, values, "config")
    except ValueError as error:
        return str(error)
    return ""


def ends(allowed):
    """(lowest, highest, lowest is outside, highest is outside) from the words; None: no end."""
    numbers = [float(n) for n in re.findall(r"-?\d[\d.]*", allowed.partition(",")[0])]
    if " to " in allowed:
        return *numbers, "but greater" in allowed, "below" in allowed
    if not numbers:
        return None, None, False, False
    return numbers[0], None, allowed.startswith("greater"), False


def outside(path):
    """Numbers of the field's type that are just out of its bounds, or no numbers at all."""
    low, high, low_is_outside, high_is_outside = ends(ALLOWED[path])
    whole = LEAVES[path][1] is int
    down = (lambda n: n - 1) if whole else (lambda n: math.nextafter(n, -math.inf))
    up = (lambda n: n + 1) if whole else (lambda n: math.nextafter(n, math.inf))
    found = [] if whole else [math.nan, math.inf, -math.inf]
    if low is not None:
        found += [low, -low] if low_is_outside else [down(low)]
    if high is not None:
        found += [high] if high_is_outside else [up(high)]
    return [int(n) for n in found] if whole else found


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_just_outside_are_refused_by_name(path):
    assert outside(path)
    for value in outside(path):
        got = checked_json.shown(value)
        assert refusal(path, value) == f"config.{path}: got {got}; allowed: {ALLOWED[path]}"


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_at_the_ends_are_not(path):
    """What the field refuses is outside, and no more; others may have something to say to it."""
    low, high, low_is_outside, high_is_outside = ends(ALLOWED[path])
    kind, taken = LEAVES[path][1], []
    if low is not None:
        taken += [math.nextafter(low, math.inf) if low_is_outside else low]
        if low == 0 and not low_is_outside and kind is float:
            taken += [-0.0]
    if high is not None:
        taken += [math.nextafter(high, -math.inf) if high_is_outside else high]
    for value in map(kind, taken):
        assert refusal(path, value) != f"config.{path}: got {value}; allowed: {ALLOWED[path]}"


@pytest.mark.parametrize("path", NUMBERS)
def test_what_is_no_number_is_refused_by_name(path):
    kind = LEAVES[path][1]
    for value in (True, False, "1", None, [1], {"a": 1}, 1j, *[1.5] * (kind is int)):
        got = f"{value!r} ({type(value).__name__})"
        assert refusal(path, value) == f"config.{path}: got {got}; allowed: {kind.__name__}"


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_beyond_all_arithmetic_are_refused_by_name(path):
    said = refusal(path, 10**5000)
    assert said.startswith(f"config.{path}: got an integer of 16610 bits; allowed: ")


@pytest.mark.parametrize("path", FLAGS)
def test_truth_values_are_true_or_false(path):
    for value in (0, 1, "true", None, 0.0):
        got = f"{value!r} ({type(value).__name__})"
        assert refusal(path, value) == f"config.{path}: got {got}; allowed: bool"
    assert not refusal(path, True)
    assert not refusal(path, False)


@pytest.mark.parametrize("path", CHOICES)
def test_other_choices_are_refused_by_name(path):
    named = ALLOWED[path].removesuffix(", or ''").split(", ")
    first = named[0]
    for value in (f"{first} ", first.upper().swapcase() + "x", "", " ", "None"):
        said = refusal(path, value)
        if value == "" and ALLOWED[path].endswith("''"):
            assert not said
        else:
            assert said == f"config.{path}: got {value!r}; allowed: {ALLOWED[path]}"


@pytest.mark.parametrize("path", TEXTS)
def test_what_is_no_text_is_refused_by_name(path):
    for value in (1, True, None, ["a"], b"a"):
        got = f"{value!r} ({type(value).__name__})"
        assert refusal(path, value) == f"config.{path}: got {got}; allowed: str"


def test_the_name_may_not_be_empty():
    assert refusal("name", "") == "config.name: got ''; allowed: a name for the run"


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_are_finite(weight):
    said = refusal("rewards.weights", {"VQ": 1.0, "other": weight})
    assert said == f"config.rewards.weights.other: got {weight}; allowed: finite"


def test_eta_is_free_where_a_match_takes_its_place():
    values = schema.default_config()
    values.rollout.update(eta=7.0)
    values.rollout.eta_match.update(kind="precise", eta=0.3)
    assert builder.from_config_dict(values).rollout.eta == pytest.approx(0.3, rel=1e-6)


REFUSE_ALL = """
import json, sys
from sage_grpo_jax.config import builder, schema

for path, value in json.load(sys.stdin).items():
    config = schema.default_config()
    config.update_from_flattened_dict({path: value})
    try:
        builder.from_config_dict(config)
    except ValueError as error:
        assert str(error).startswith(f"config.{path}: got "), error
    else:
        raise AssertionError(path)
"""


def test_no_device_is_touched_before_a_refusal():
    """Here there is none to be touched: the first use of JAX would raise."""
    cases = {path: outside(path)[-1] for path in NUMBERS} | dict.fromkeys(CHOICES, "x")
    del cases["method"]  # a name that no override can change
    subprocess.run(
        [sys.executable, "-c", REFUSE_ALL],
        input=json.dumps(cases),
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        text=True,
        check=True,
    )
