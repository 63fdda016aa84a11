"""Settings: what the recipe says, what flags override, what is refused."""

import dataclasses

import numpy as np
import pytest

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.sampling import settings as settings_lib

DIT = HunyuanVideoConfig()


def _settings(**given) -> settings_lib.Settings:
    config = schema.default_config()
    config.eval.num_steps = 7
    config.rollout.update(shift=9.0, guidance=6.0, eta=0.3)
    config.video.update(frames=9, height=352, width=624, fps=24.0)
    return settings_lib.from_config(builder.from_config_dict(config), **given)


def test_defaults_are_those_of_the_recipes_evaluation():
    found = _settings(steps=None)
    assert (found.sampler, found.steps, found.shift, found.guidance) == ("ode", 7, 9.0, 6.0)
    assert (found.frames, found.height, found.width, found.fps) == (9, 352, 624, 24.0)
    assert (found.tiling, found.format, found.eta) == ("off", "mp4", 0.0)


@pytest.mark.parametrize(
    ("sampler", "clamp"), [("precise", 0.02), ("flow", 0.0), ("ode", 0.0), (None, 0.0)]
)
def test_the_clamp_of_the_recipe_belongs_to_its_sampler(sampler, clamp):
    recipe = schema.default_config()
    recipe.rollout.clamp = 0.02
    made = settings_lib.from_config(builder.from_config_dict(recipe), sampler=sampler, steps=20)
    assert made.clamp == clamp
    # The last step is clean; the first ends within 0.02 of pure noise.
    recipe_steps = {"precise": 18, "flow": 19, "ode": 0, None: 0}[sampler]
    assert made.stochastic.sum() == recipe_steps


def test_flags_override():
    found = _settings(sampler="precise", steps=3, eta=0.5, guidance=1.0, format="both")
    assert (found.sampler, found.steps, found.eta, found.guidance) == ("precise", 3, 0.5, 1.0)
    assert found.suffixes == ("mp4", "gif")
    np.testing.assert_array_equal(found.stochastic, [True, True, False])
    assert _settings(sampler="flow").eta == 0.3
    assert not _settings().stochastic.any()


def test_tiling_is_automatic_above_one_tile():
    assert _settings(tiling="auto").tiling == "official"
    assert _settings(tiling="auto", height=256, width=256).tiling == "off"
    assert _settings(tiling="diffusers").tiling == "diffusers"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "euler"}, "--sampler: got 'euler'; allowed: precise, flow"),
        ({"steps": 0}, "--steps: got 0; allowed: 1 to 1000"),
        ({"shift": float("nan")}, "--shift: got nan"),
        ({"guidance": float("inf")}, "--guidance: got inf; allowed: at least 0"),
        ({"sampler": "cps", "eta": 1.5}, "--eta: got 1.5; allowed: 0 to 1.0"),
        ({"eta": 3.0}, "--eta: got 3.0; allowed: 0 to 2.0"),  # ode, which does not use it
        ({"eta": -1.0}, "--eta: got -1.0"),
        ({"eta": float("nan")}, "--eta: got nan"),
        ({"height": 0}, "--height: got 0; allowed: at least 1"),
        ({"format": "avi"}, "--format: got 'avi'; allowed: mp4, gif, both"),
    ],
)
def test_bad_values_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        _settings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 8}, "--frames: got 8; allowed: 1 \\+ a multiple of 4"),
        ({"height": 350}, "--height: got 350; allowed: a multiple of 16"),
        ({"width": 8}, "--width: got 8"),
    ],
)
def test_clips_that_the_vae_cannot_make_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        settings_lib.check_clip(_settings(**given), DIT, VaeConfig())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 13}, "--frames: got 13; .* 1 \\+ a multiple of 4 that gives a multiple of 3"),
        ({"height": 336}, "--height: got 336; allowed: a multiple of 32"),
        ({"width": 656}, "--width: got 656; allowed: a multiple of 32"),
    ],
)
def test_clips_that_make_no_whole_tokens_are_refused(given, message):
    """A transformer whose tokens are 3 x 2 x 2 latents."""
    coarse = dataclasses.replace(DIT, patch_size=2, patch_size_t=3)
    fitting = {"frames": 9, "height": 320, "width": 640}
    settings_lib.check_clip(_settings(**fitting), coarse, VaeConfig())
    with pytest.raises(ValueError, match=message):
        settings_lib.check_clip(_settings(**fitting | given), coarse, VaeConfig())


def test_tiles_that_the_vae_cannot_make_are_refused():
    coarse = dataclasses.replace(
        VaeConfig(), spatial_compression_ratio=64, block_out_channels=(128,) * 7
    )
    settings = _settings(tiling="official", height=320, width=640)
    settings_lib.check_clip(settings, DIT, VaeConfig())
    with pytest.raises(ValueError, match=r"--tiling: got official; overlap=0\.125"):
        settings_lib.check_clip(settings, DIT, coarse)


def test_seeds():
    assert settings_lib.parse_seeds(["3", " 0"]) == [3, 0]
    assert settings_lib.parse_seeds(["0" * 20 + "7", str(2**32 - 1)]) == [7, 2**32 - 1]
    bad_seeds = (["a"], ["-1"], [], ["1", "1"], [str(2**32)], [""], ["²"], ["٣"], ["9" * 5000])
    for bad in bad_seeds:
        with pytest.raises(ValueError, match="--seeds: got"):
            settings_lib.parse_seeds(bad)
