"""The Wan DiT's configuration, parameters, text, meshes and precision (parity has its own file)."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from wan_oracle import TINY, make_inputs

from sage_grpo_jax.models import wan
from sage_grpo_jax.models.wan import WanConfig
from sage_grpo_jax.parallel import sharding

# The config.json of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, which is older than pos_embed_seq_len.
RELEASED = """{"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0",
 "added_kv_proj_dim": null, "attention_head_dim": 128, "cross_attn_norm": true, "eps": 1e-06,
 "ffn_dim": 8960, "freq_dim": 256, "image_dim": null, "in_channels": 16,
 "num_attention_heads": 12, "num_layers": 30, "out_channels": 16, "patch_size": [1, 2, 2],
 "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096}"""
SMALL = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)  # 1.3 B
LARGE = WanConfig()  # 14 B
GRID, LENGTHS = (1, 10, 6), (4, 2, 0, 7)  # 15 tokens
velocity = jax.jit(wan.velocity, static_argnums=4)


def abstract_params(config):
    return jax.eval_shape(functools.partial(wan.init_params, config), jax.random.key(0))


@functools.cache
def random_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.02, 0.1, x.shape), x.dtype), abstract_params(TINY)
    )


def inputs():
    return make_inputs(TINY, GRID, LENGTHS)


@pytest.mark.parametrize(("config", "count"), [(SMALL, 1_418_996_800), (LARGE, 14_288_491_584)])
def test_released_models_have_as_many_parameters_as_in_diffusers(config, count):
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(json.loads(config.to_json()))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_every_parameter_axis_has_a_name():
    names = wan.partition_names(LARGE)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(LARGE)):
        axes = functools.reduce(lambda tree, key: tree[key.key], path, names)
        text = jax.tree_util.keystr(path)
        assert isinstance(axes, tuple), text
        assert len(axes) == len(leaf.shape), text
        assert set(axes) <= {"layers", "embed", "mlp", "heads", "conv_in", "conv_out", None}, text
        assert (axes[0] == "layers") == ("blocks" in text), text
        # Whatever is large must be divisible over devices.
        assert "embed" in axes or math.prod(leaf.shape) < 2_000_000, text


def test_fresh_model_is_zero_and_its_layers_differ():
    params = wan.init_params(TINY, jax.random.key(0))
    assert not np.any(velocity(params, *inputs(), TINY))
    kernel, table = params["blocks"]["mlp"]["in"]["kernel"], params["blocks"]["modulation"]["table"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    # Standard deviation 1 / sqrt(width), as in the official code.
    np.testing.assert_allclose(np.std(table), TINY.hidden_size**-0.5, rtol=0.2)


def test_masked_tokens_count_as_zeros_and_are_attended_to():
    latents, timestep, condition = inputs()
    want = velocity(random_params(), latents, timestep, condition, TINY)
    text = np.where(condition.text_mask[:, :, None], condition.text, np.nan)
    masked = condition._replace(text=text)
    got = velocity(random_params(), latents, timestep, masked, TINY)
    np.testing.assert_array_equal(got, want)
    # Another token of nothing is another token: no mask reaches the attention.
    longer = wan.Condition(
        np.pad(condition.text, ((0, 0), (0, 3), (0, 0))),
        np.pad(condition.text_mask, ((0, 0), (0, 3))),
    )
    other = velocity(random_params(), latents, timestep, longer, TINY)
    assert np.abs(other[0] - want[0]).max() > 1e-3


def test_mesh_changes_nothing():
    """15 image tokens on a context axis of 2: one token of padding."""
    want = velocity(random_params(), *inputs(), TINY)
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"), axis_types=auto)

    names = wan.partition_names(TINY)
    shardings = sharding.parameter_shardings(mesh, names, random_params())
    params = jax.device_put(random_params(), shardings)
    batch = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    given = jax.device_put(inputs(), batch)
    with jax.set_mesh(mesh):
        compiled = velocity.lower(params, *given, TINY).compile()
        got = compiled(params, *given)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # One exchange each of queries, keys, values and the result, in self-attention alone: the
    # blocks are scanned over, so they stand in the program once.
    lines = compiled.as_text().splitlines()
    assert len([line for line in lines if " all-to-all(" in line and "/Block/" in line]) == 4
    # Modulation is computed where its kernel lies: [24, 6 * 24] is not gathered.
    gathers = [line.split("all-gather(")[0] for line in lines if " all-gather(" in line]
    assert gathers
    assert not [line for line in gathers if "24,144]" in line]


def test_bfloat16_is_close_to_float32_and_returns_float32():
    want = velocity(random_params(), *inputs(), TINY)
    config = dataclasses.replace(TINY, dtype="bfloat16")
    got = velocity(random_params(), *inputs(), config)
    assert got.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want)))
    assert 1e-5 < error < 0.03


def test_config_round_trip_and_diffusers_reads_it():
    assert WanConfig.from_json(RELEASED) == SMALL
    config = WanConfig(num_layers=1, eps=1e-5, dtype="bfloat16", remat=False)
    text = config.to_json()
    assert not {"dtype", "attention", "remat", "unroll"} & set(json.loads(text))
    assert WanConfig.from_json(text, dtype="bfloat16", remat=False) == config
    theirs = WanTransformer3DModel.from_config(json.loads(TINY.to_json()))
    assert WanConfig.from_json(theirs.to_json_string(), remat=False) == TINY


@pytest.mark.parametrize("size", [2, 4, 6, 10, 16, 64, 128])
def test_rope_axes_are_those_of_diffusers(size):
    with torch.device("meta"):
        config = dataclasses.replace(TINY, attention_head_dim=size)
        rope = WanTransformer3DModel.from_config(json.loads(config.to_json())).rope
    assert config.rope_axes_dim == (rope.t_dim, rope.h_dim, rope.w_dim)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_size": (1, 2)}, r"patch_size=\(1, 2\): must be three numbers of 1 to 64"),
        ({"patch_size": (1, 0, 2)}, r"patch_size=\(1, 0, 2\)"),
        ({"num_layers": 0}, "num_layers=0: must be 1 to 1024"),
        ({"ffn_dim": 1 << 40}, "ffn_dim=1099511627776: must be 1 to"),
        ({"attention_head_dim": 7}, "attention_head_dim=7: must be even"),
        ({"freq_dim": 15}, "freq_dim=15: must be even"),
        ({"in_channels": 36}, "in_channels=36: must be out_channels=4: text-to-video"),
        ({"qk_norm": "layer_norm"}, "qk_norm=layer_norm: must be rms_norm_across_heads"),
        ({"eps": 0.0}, r"eps=0\.0: must be greater than 0"),
        ({"eps": math.nan}, "eps=nan"),
        ({"dtype": "float16"}, "dtype=float16: must be one of"),
        ({"attention": "flash"}, "attention=flash: must be one of"),
        ({"image_dim": 1280, "in_channels": 36}, "image_dim=1280: must be null: image-to-video"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim=5120: must be null"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len=514: must be null"),
    ],
)
def test_bad_configs(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(TINY, **overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"depth": 3}', r"unknown fields \['depth'\]"),
        ('{"_class_name": "Other"}', "_class_name=Other: must be WanTransformer3DModel"),
        ('{"num_layers": "3"}', "num_layers='3': must be an integer"),
        ('{"patch_size": 2}', "patch_size=2: must be"),
        ('{"qk_norm": null}', "qk_norm=None: must be a string"),
        ('{"dtype": "float32"}', "unknown fields"),
    ],
)
def test_bad_config_files(text, message):
    with pytest.raises(ValueError, match=message):
        WanConfig.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": np.zeros((4, 7, 9))}, r"condition\.text\.shape=\(4, 7, 9\)"),
        ({"text": np.zeros((3, 7, 10))}, r"condition\.text\.shape=\(3, 7, 10\)"),
        ({"text_mask": np.ones((4, 3), bool)}, r"condition\.text_mask\.shape=\(4, 3\)"),
    ],
)
def test_bad_conditions(change, message):
    latents, timestep, condition = inputs()
    with pytest.raises(ValueError, match=message):
        wan.velocity({}, latents, timestep, condition._replace(**change), TINY)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 1, 5, 6, 4), "latents axis H=5: must be a multiple of the patch 2"),
        ((4, 1, 4, 34, 4), r"latents axis W=34: must be at most 16 patches \(rope_max_seq_len\)"),
        ((4, 1, 4, 6, 5), r"latents\.shape=\(4, 1, 4, 6, 5\)"),
        ((2, 1, 4, 6, 4), r"timestep\.shape=\(4,\): must be \(2,\)"),
    ],
)
def test_bad_latents(shape, message):
    _, timestep, condition = inputs()
    config = dataclasses.replace(TINY, rope_max_seq_len=16)
    with pytest.raises(ValueError, match=message):
        wan.velocity({}, np.zeros(shape), timestep, condition, config)
