"""Pretraining settings: bad ones are refused with section, field, value and what is allowed."""

import importlib.util
import math
import pathlib
from typing import Any

import pytest

from sage_grpo_jax.pretraining import settings

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "moving_shapes_pretrain.py"


@pytest.fixture
def values() -> dict[str, Any]:
    """The settings of the shipped weights, with the numbers that are named below."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config().to_dict()
    found["vae"].update(steps=4000, short_steps=3000)
    found["latents"] = {"num_clips": 128, "batch_size": 64}
    found["sharpen"]["max_sigma"] = 0.7
    found["report"]["num_samples"] = 64
    return found


def test_defaults_fill_what_a_recipe_leaves_out(values):
    del values["report"]["sheet_frames"]
    values["report"]["sampling_steps"] = [3, 5]  # as a flag leaves it
    values["flow"]["shift"] = 2
    made = settings.from_mapping(values)
    assert (made.report.sheet_frames, made.report.sampling_steps) == (6, (3, 5))
    assert made.flow.shift == 2.0
    assert isinstance(made.flow.shift, float)
    assert (made.sharpen.max_sigma, made.vae.short_steps) == (0.7, 3000)
    assert made.transformer.rope_axes_dim == tuple(values["transformer"]["rope_axes_dim"])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vae", {"steps": 0}, "vae.steps: got 0; allowed: at least 1"),
        ("vae", {"step": 1}, "vae.step: unknown field; allowed: steps, batch_size"),
        ("vae", {"short_steps": 4001}, "vae.short_steps: got 4001; allowed: 0 to its steps, 4000"),
        ("vae", {"batch_size": True}, r"vae.batch_size: got True \(bool\); allowed: int"),
        ("vae", {"learning_rate": math.inf}, "vae.learning_rate: got inf; allowed: greater than 0"),
        ("vae", {"learning_rate": "1"}, r"vae.learning_rate: got '1' \(str\); allowed: float"),
        ("flow", {"caption_drop": 1.0}, "flow.caption_drop: got 1.0; allowed: 0 to 1, but below 1"),
        ("flow", {"optimizer": "sgd"}, "flow.optimizer: got 'sgd'; allowed: adamw, muon"),
        ("flow", {"shift": -1.0}, "flow.shift: got -1.0; allowed: greater than 0 and finite"),
        ("flow", {"sigma_mean": math.nan}, "flow.sigma_mean: got nan; allowed: finite"),
        ("distill", {"guidance": 0.5}, "distill.guidance: got 0.5; allowed: at least 1"),
        ("sharpen", {"max_sigma": 0}, "sharpen.max_sigma: got 0.0; allowed: 0 to 1, but greater"),
        ("latents", {"num_clips": 130}, r"latents.num_clips: got 130; .* multiple of .* \(64\)"),
        ("latents", {"num_clips": 0}, "latents.num_clips: got 0; allowed: at least 1"),
        ("report", {"sampling_steps": ()}, r"sampling_steps: got \(\); allowed: one or more, each"),
        ("report", {"sampling_steps": [3, 0]}, r"got \(3, 0\); allowed: one or more, each at le"),
        ("report", {"sampling_steps": 3}, r"got 3 \(int\); allowed: a tuple"),
        ("report", {"sheet_rows": 99}, "report.sheet_rows: got 99; allowed: at most .*=64"),
        ("vae_model", {"latent_channel": 4}, r"vae_model: unknown fields \['latent_channel'\]"),
        ("vae_model", {"latent_channels": "4"}, "vae_model: latent_channels='4': must be an int"),
        ("transformer", {"_class_name": "Unet"}, "transformer: _class_name is 'Unet'; allowed: "),
    ],
)
def test_bad_settings(values, section, change, message):
    values[section] |= change
    with pytest.raises(ValueError, match=message):
        settings.from_mapping(values)


@pytest.mark.parametrize("seed", [-1, 0.5, True, None])
def test_bad_seeds(values, seed):
    with pytest.raises(ValueError, match=rf"seed: got {seed}.*; allowed: "):
        settings.from_mapping(values | {"seed": seed})


def test_missing_settings(values):
    del values["flow"]["batch_size"]
    with pytest.raises(ValueError, match=r"^flow\.batch_size: missing"):
        settings.from_mapping(values)
    del values["vae"]
    with pytest.raises(ValueError, match=r"missing sections \['vae'\]"):
        settings.from_mapping(values)


def test_a_section_that_is_no_group_is_refused(values):
    with pytest.raises(ValueError, match=r"^vae: got 3; allowed: a group of fields"):
        settings.from_mapping(values | {"vae": 3})


def test_a_stage_by_itself_is_checked_too():
    with pytest.raises(ValueError, match=r"^StageConfig.log_every: got 0; allowed: at least 1"):
        settings.StageConfig(steps=1, batch_size=1, learning_rate=0.1, log_every=0)
