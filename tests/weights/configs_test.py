"""Configs from config.json, and from tensors, for the released sizes (shapes only)."""

import dataclasses
import json

import official_layout as official
import pytest
from one_line import one_line

from sage_grpo_jax import weights
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights import configs, layouts
from sage_grpo_jax.weights.tables import hunyuan_video_keys
from sage_grpo_jax.weights.tables.key_table import check_tensors

HUGE = 10**400
FULL = {
    "base": HunyuanVideoConfig(),
    "step_distilled": HunyuanVideoConfig(use_meanflow=True),
    "no_text_pictures": HunyuanVideoConfig(text_embed_2_dim=None, image_embed_dim=None),
    "vae": VaeConfig(),
}


# config.json


def load(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return weights.load_config(tmp_path)


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
    ("config", "changes", "message"),
    [
        (official.DIT, {"num_attention_heads": 0}, "num_attention_heads=0: must be 1 to 1024"),
        (official.DIT, {"num_attention_heads": "2"}, "num_attention_heads='2': must be an integ"),
        (official.DIT, {"num_attention_heads": True}, "num_attention_heads=True: must be an inte"),
        (official.DIT, {"rope_theta": float("inf")}, "Infinity is no number in JSON"),
        (official.DIT, {"rope_theta": None}, "rope_theta=None: must be a finite number"),
        (official.DIT, {"rope_axes_dim": [-2, 12, 6]}, "three even numbers"),
        (official.DIT, {"task_type": "v2v"}, "task_type=v2v: must be one of"),
        (official.DIT, {"num_layers": HUGE}, "num_layers=an integer of 1329 bits"),
        (official.DIT, {"attention": "xla"}, r"unknown fields \['attention'\]"),
        (official.VAE, {"scaling_factor": 0}, "scaling_factor=0: must be positive"),
        (official.VAE, {"block_out_channels": "abc"}, "block_out_channels='abc': must be a list"),
        (official.VAE, {"block_out_channels": [8, 0, 32]}, "each must be 1 to 65536"),
        (official.VAE, {"block_out_channels": [8] * 99}, "at most 16"),
        (official.VAE, {"layers_per_block": 10**6}, "layers_per_block=1000000: must be 1 to 32"),
        (official.VAE, {"spatial_compression_ratio": 2**60}, "power of two up to 1024"),
        (official.VAE, {"dtype": "float32"}, r"unknown fields \['dtype'\]"),
    ],
)
def test_diffusers_config(config, changes, message, tmp_path):
    text = json.dumps(json.loads(config.to_json()) | changes)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: .*{message}") as error:
        weights.load_config(tmp_path)
    one_line(error)


# Tensors


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


@pytest.mark.parametrize("layout", hunyuan_video_keys.LAYOUTS)
@pytest.mark.parametrize("config", [official.DIT, official.VAE, HunyuanVideoConfig(), VaeConfig()])
def test_one_missing_tensor_is_that_and_nothing_else(config, layout):
    rows, shapes = layouts.key_table(config, layout)
    whole = {name: row.shape_there(shapes[row.ours]) for row in rows for name in row.names()}
    names = sorted(whole)
    for name in names[:: max(1, len(names) // 40)]:
        part = {other: shape for other, shape in whole.items() if other != name}
        configs.check_config(config, layout, part)
        with pytest.raises(ValueError, match=rf"; missing: {name.replace('.', '[.]')}$"):
            check_tensors(rows, shapes, part)
        more = whole | {f"{name}.extra": (1,)}
        configs.check_config(config, layout, more)


def test_a_missing_block_is_named_too():
    rows, shapes = layouts.key_table(official.DIT, "diffusers")
    whole = {name: row.shape_there(shapes[row.ours]) for row in rows for name in row.names()}
    part = {name: s for name, s in whole.items() if not name.startswith("transformer_blocks.1.")}
    configs.check_config(official.DIT, "diffusers", part)
    with pytest.raises(ValueError, match=r"missing: transformer_blocks\.1\.attn\.add_k_proj"):
        check_tensors(rows, shapes, part)
    # Fewer blocks are a model of another depth.
    part = {name: s for name, s in whole.items() if not name.startswith("transformer_blocks.2.")}
    with pytest.raises(ValueError, match="num_layers=3, the tensors say 2"):
        configs.check_config(official.DIT, "diffusers", part)
