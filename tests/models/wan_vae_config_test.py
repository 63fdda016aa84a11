"""Configs of the Wan 2.1 VAE: diffusers' files, and what is refused."""

import inspect
import json

import jax.numpy as jnp
import pytest
from diffusers import AutoencoderKLWan

from sage_grpo_jax.models import wan_vae
from sage_grpo_jax.models.wan_vae import WanVaeConfig

TINY = {
    "base_dim": 4,
    "z_dim": 2,
    "dim_mult": (1, 2),
    "num_res_blocks": 1,
    "temperal_downsample": (True,),
    "latents_mean": (0.5, -1),
    "latents_std": (1.0, 2.0),
}
JSON = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}


def test_the_defaults_are_those_of_diffusers():
    ours = json.loads(WanVaeConfig().to_json())
    assert ours.pop("_class_name") == "AutoencoderKLWan"
    parameters = inspect.signature(AutoencoderKLWan.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    assert ours == theirs


def test_json_round_trip_with_diffusers():
    for config in (WanVaeConfig(**TINY), WanVaeConfig(**TINY, decoder_base_dim=6, dropout=0.5)):
        theirs = AutoencoderKLWan.from_config(json.loads(config.to_json()))
        assert WanVaeConfig.from_json(theirs.to_json_string()) == config
        assert hash(WanVaeConfig.from_json(config.to_json())) == hash(config)
        assert theirs.config.scale_factor_spatial == theirs.config.scale_factor_temporal == 2
    assert WanVaeConfig.from_json(config.to_json(), dtype="bfloat16").dtype == "bfloat16"


def test_a_file_of_the_released_model_needs_no_later_field():
    names = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales",
             "temperal_downsample", "dropout", "latents_mean", "latents_std")  # fmt: skip
    whole = json.loads(WanVaeConfig().to_json())
    text = json.dumps({"_class_name": "AutoencoderKLWan"} | {name: whole[name] for name in names})
    config = WanVaeConfig.from_json(text)
    assert config == WanVaeConfig()
    ratios = (config.spatial_compression_ratio, config.temporal_compression_ratio)
    assert (*ratios, config.latent_channels) == (8, 4, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_dim": 0}, "base_dim=0: must be 1 to 16384"),
        ({"decoder_base_dim": 0}, "decoder_base_dim=0: must be 1"),
        ({"decoder_base_dim": 1, "dim_mult": (1, 1)}, "dim_mult=.* must be such that every"),
        ({"dim_mult": ()}, "dim_mult=\\(\\): must be of 1 to 16 levels"),
        ({"dim_mult": (1, 0)}, "dim_mult=\\(1, 0\\): must be each at least 1"),
        ({"dim_mult": (1, 2, 4)}, "temperal_downsample=\\(True,\\): must be one for each of the 2"),
        ({"dim_mult": (1, 1 << 20)}, "no level is wider than 65536"),
        ({"temperal_downsample": (2,)}, "temperal_downsample=\\(2,\\): must be each true or false"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"attn_scales": (1.0,)}, "attn_scales=\\(1.0,\\): must be empty"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"latents_mean": (0.0,)}, "latents_mean=\\(0.0,\\): must be z_dim=2 numbers"),
        ({"latents_std": (1.0, 0.0)}, "latents_std=\\(1.0, 0.0\\): must be positive"),
        ({"latents_std": (1.0, float("nan"))}, "latents_std=\\(1.0, nan\\): must be finite"),
        ({"dtype": "float8"}, "dtype='float8'"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        WanVaeConfig(**(TINY | fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": 3}, "unknown fields \\['sample_size'\\]"),
        ({"is_residual": True}, "is_residual=True: must be false .Wan 2.2's own VAE"),
        ({"patch_size": 2}, "patch_size=2: must be null"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial=16: must be 2, as dim_mult"),
        ({"scale_factor_temporal": "2"}, "scale_factor_temporal='2': must be an integer"),
        ({"dim_mult": [1, 2.5]}, "dim_mult=\\[1, 2.5\\]: must be a list, each an integer"),
        ({"temperal_downsample": [1]}, "temperal_downsample=\\[1\\]: must be a list, each true"),
        ({"z_dim": "2"}, "z_dim='2': must be an integer"),
    ],
)
def test_bad_files_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WanVaeConfig.from_json(json.dumps(JSON | fields))


def test_ratios_that_diffusers_never_updates_are_taken_for_what_they_are():
    fields = {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "is_residual": False}
    config = WanVaeConfig.from_json(json.dumps(JSON | fields))
    assert config == WanVaeConfig(**TINY)
    assert config.spatial_compression_ratio == 2


def test_clips_latents_and_pieces_are_checked():
    config = WanVaeConfig(**TINY)
    with pytest.raises(ValueError, match="frames=4: must be 1 plus a multiple of 2"):
        wan_vae.encode({}, jnp.zeros((1, 4, 4, 4, 3)), config)
    with pytest.raises(ValueError, match="channels=3: must be latent_channels=2"):
        wan_vae.decode({}, jnp.zeros((1, 1, 2, 2, 3)), config)
    with pytest.raises(ValueError, match="latent_frames=0: must be None or at least 1"):
        wan_vae.decode({}, jnp.zeros((1, 1, 2, 2, 2)), config, 0)
    with pytest.raises(ValueError, match="latent_frames=-1: must be None"):
        wan_vae.encode({}, jnp.zeros((1, 3, 2, 2, 3)), config, -1)
