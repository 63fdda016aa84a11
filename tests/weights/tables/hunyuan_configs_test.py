"""config.json of HunyuanVideo-1.5 as Tencent writes it: what is read, refused and written."""

import dataclasses
import json

import official_layout as official
import pytest
from one_line import one_line

from sage_grpo_jax import weights
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.weights import configs

HUGE = 10**400


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_num": 0}, "heads_num=0: must be at least 1"),
        ({"heads_num": -2}, "heads_num=-2: must be at least 1"),
        ({"heads_num": HUGE}, "heads_num=an integer of 1329 bits: must be an integer"),
        ({"mm_double_blocks_depth": 10**9}, "num_layers=1000000000: must be 1 to 1024"),
        ({"hidden_size": 2**40}, "attention_head_dim=549755813888: must be 1 to 4096"),
        ({"rope_theta": float("nan")}, "NaN is no number in JSON"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: must be positive, finite"),
        ({"rope_theta": HUGE}, "rope_theta=.*: must be a finite number"),
        ({"ideal_task": "sr"}, r"ideal_task=sr: must be one of \('t2v', 'i2v'\)"),
        ({"ideal_task": ["t2v"]}, r"ideal_task=\['t2v'\]: must be a string or null"),
        ({"patch_size": {}}, r"patch_size=\{\}: must be an integer or a list of 3"),
        ({"rope_dim_list": [4, 6]}, r"rope_dim_list=\[4, 6\]: must be a list of 3"),
        ({"mlp_width_ratio": 1e308}, r"mlp_ratio=1e\+308: must be such that 32 times it"),
        ({"_class_name": []}, r"_class_name=\[\]: must be a string or null"),
    ],
)
def test_tencents_config(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(official.DIT_JSON | changes))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: .*{message}") as error:
        weights.load_config(tmp_path)
    one_line(error)
