"""Configs from tensors, for the released sizes (shapes only), and Tencent's config.json."""

import dataclasses
import json

import official_layout as official
import pytest

from sage_grpo_jax import weights
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights import configs, layouts
from sage_grpo_jax.weights.tables import hunyuan_video_keys

FULL = {
    "base": HunyuanVideoConfig(),
    "step_distilled": HunyuanVideoConfig(use_meanflow=True),
    "no_text_pictures": HunyuanVideoConfig(text_embed_2_dim=None, image_embed_dim=None),
    "vae": VaeConfig(),
}


def shapes(config, layout):
    rows, parameters = layouts.key_table(config, layout)
    return {name: row.shape_there(parameters[row.ours]) for row in rows for name in row.names()}


@pytest.mark.parametrize("layout", hunyuan_video_keys.LAYOUTS)
@pytest.mark.parametrize("name", FULL)
def test_released_models_need_no_config(name, layout):
    found = shapes(FULL[name], layout)
    assert configs.infer_config(layout, found) == FULL[name]
    configs.check_config(FULL[name], layout, found)


def test_size_of_the_released_dit():
    """1801 tensors in diffusers' layout; four fewer per refiner block where they are fused."""
    assert len(shapes(FULL["base"], "diffusers")) == 1801
    assert len(shapes(FULL["base"], "tencent")) == 1801 - 2 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"spatial_compression_ratio": 8, "temporal_compression_ratio": 2},
        {"downsample_match_channel": False, "block_out_channels": (32, 64, 128, 128, 256)},
        {"upsample_match_channel": False, "block_out_channels": (64, 64, 64, 64, 64)},
        {"layers_per_block": 3, "in_channels": 4, "out_channels": 2, "latent_channels": 16},
    ],
)
def test_vae_facts_agree_with_the_config(changes):
    config = VaeConfig(**changes)
    for layout in hunyuan_video_keys.LAYOUTS:
        configs.check_config(config, layout, shapes(config, layout))
        other = dataclasses.replace(config, temporal_compression_ratio=1)
        with pytest.raises(ValueError, match=r"temporal_compression_ratio=1, the tensors say \d"):
            configs.check_config(other, layout, shapes(config, layout))


def test_what_cannot_be_inferred():
    with pytest.raises(ValueError, match=r"no config\.json, and the tensors are not those of"):
        configs.infer_config("tencent", {"a": (1,)})
    with pytest.raises(ValueError, match="not those of a model in the diffusers layout"):
        configs.infer_config("diffusers", shapes(official.VAE, "tencent"))
    with pytest.raises(ValueError, match=r"scaling_factor is not in the tensors.*--config_json"):
        configs.infer_config("tencent", shapes(official.VAE, "tencent"))


def load(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return weights.load_config(tmp_path)


def test_released_config_json(tmp_path):
    values = official.DIT_JSON | {
        "heads_num": 16,
        "hidden_size": 2048,
        "in_channels": 32,
        "out_channels": 32,
        "mm_double_blocks_depth": 54,
        "rope_dim_list": [16, 56, 56],
        "text_states_dim": 3584,
        "use_meanflow": False,
        "vision_states_dim": 1152,
        "ideal_resolution": "720p",
        "ideal_task": "i2v",
        "attn_mode": "flex-block-attn",
        "attn_param": {"win_type": "fixed"},
    }
    config = load(tmp_path, values)
    assert config == HunyuanVideoConfig(target_size=960, task_type="i2v")
    back = json.loads(configs.to_json(config, "tencent"))
    assert back == {k: v for k, v in values.items() if not k.startswith("_di")} | {
        "attn_mode": "flash",
        "attn_param": None,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_single_blocks_depth": 40}, "mm_single_blocks_depth=40: must be 0"),
        ({"guidance_embed": True}, "guidance_embed=True: must be False"),
        ({"heads_num": 3}, "hidden_size=32: must be a multiple of heads_num=3"),
        ({"patch_size": [1, 2, 1]}, "patch_size"),
        ({"ideal_resolution": "1080p"}, "ideal_resolution=1080p: must be one of"),
        ({"vision_projection": "clip"}, "vision_projection=clip"),
        ({"window": 3}, r"fields=\['window'\]: must be only"),
        ({"rope_dim_list": [4, 4, 4]}, "rope_axes_dim"),
    ],
)
def test_other_models_of_tencent(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, official.DIT_JSON | change)


def test_damaged_configs(tmp_path):
    fields = {k: v for k, v in official.DIT_JSON.items() if k != "heads_num"}
    with pytest.raises(ValueError, match="heads_num is missing: must be an integer"):
        load(tmp_path, fields)
    with pytest.raises(ValueError, match=r"shift_factor=0\.5: must be None or 0"):
        load(tmp_path, official.VAE_JSON | {"shift_factor": 0.5})
    with pytest.raises(ValueError, match="_class_name='X': must be one of"):
        load(tmp_path, {"_class_name": "X"})
    with pytest.raises(ValueError, match="_class_name=None"):
        load(tmp_path, {})
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object: \[\]"):
        load(tmp_path, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_embed_2_dim": 6}, "text_embed_2_dim=6"),
        ({"num_refiner_layers": 1}, "num_refiner_layers=1"),
        ({"in_channels": 10}, "in_channels=10"),
        ({"target_size": 512}, "target_size=512"),
    ],
)
def test_models_that_tencents_config_cannot_express(change, message):
    config = dataclasses.replace(official.DIT, **change)
    with pytest.raises(ValueError, match=f"{message}.* in Tencent's layout"):
        configs.to_json(config, "tencent")
