"""The DiT's configuration, parameters, masks, meshes and precision (parity has its own file)."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import HunyuanVideo15Transformer3DModel

from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.models.hunyuan_video import Condition, HunyuanVideoConfig

CONFIG = HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    text_embed_dim=8,
    text_embed_2_dim=None,
    image_embed_dim=None,
    rope_axes_dim=(4, 6, 6),
)
CONFIG_WITH_PARTS = dataclasses.replace(CONFIG, text_embed_2_dim=6, image_embed_dim=5)
# LLVM's optimisations take longer than these small runs.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
velocity = jax.jit(hunyuan_video.velocity, static_argnums=4, compiler_options=COMPILER_OPTIONS)


@functools.cache
def random_params(config: HunyuanVideoConfig = CONFIG):
    make = functools.partial(hunyuan_video.init_params, config)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.02, 0.1, x.shape), x.dtype),
        jax.eval_shape(make, jax.random.key(0)),
    )


def make_inputs(batch=4, grid=(1, 5, 3), lengths=(4, 2, 0, 3)):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((batch, *grid, 4), np.float32)
    text = rng.standard_normal((batch, 4, 8), np.float32)
    timestep = np.linspace(1000.0, 10.0, batch, dtype=np.float32)
    mask = np.arange(4) < np.array(lengths)[:batch, None]
    return latents, timestep, Condition(text, mask)


def test_full_model_has_the_published_number_of_parameters():
    def count(config):
        make = functools.partial(hunyuan_video.init_params, config)
        leaves = jax.tree.leaves(jax.eval_shape(make, jax.random.key(0)))
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
        return sum(math.prod(leaf.shape) for leaf in leaves)

    full = HunyuanVideoConfig()
    assert count(full) == 8_326_608_160
    assert count(dataclasses.replace(full, use_meanflow=True)) == 8_331_330_848


def test_every_parameter_axis_has_a_name():
    config = HunyuanVideoConfig(use_meanflow=True)
    make = functools.partial(hunyuan_video.init_params, config)
    abstract = jax.eval_shape(make, jax.random.key(0))
    names = hunyuan_video.partition_names(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        axes = functools.reduce(lambda tree, key: tree[key.key], path, names)
        text = jax.tree_util.keystr(path)
        assert isinstance(axes, tuple), text
        assert len(axes) == len(leaf.shape), text
        assert set(axes) <= {"layers", "embed", "mlp", "heads", "conv_in", "conv_out", None}, text
        assert (axes[0] == "layers") == ("blocks" in text), text
        # Whatever is large must be divisible over devices; a vision layer of 5 MB is the limit.
        assert "embed" in axes or math.prod(leaf.shape) < 2_000_000, text


def test_fresh_model_is_zero_and_its_layers_differ():
    params = hunyuan_video.init_params(CONFIG, jax.random.key(0))
    latents, timestep, condition = make_inputs()
    assert not np.any(velocity(params, latents, timestep, condition, CONFIG))
    kernel = params["blocks"]["image"]["query"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_masked_tokens_have_no_influence():
    latents, timestep, condition = make_inputs()
    params = random_params()
    want = velocity(params, latents, timestep, condition, CONFIG)
    text = np.where(condition.text_mask[:, :, None], condition.text, 1e3)
    got = velocity(params, latents, timestep, condition._replace(text=text), CONFIG)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want[0] - want[1]).max() > 0.1


def test_gradients_without_any_text_are_finite():
    config = dataclasses.replace(CONFIG, num_layers=1, remat=False)
    latents, timestep, condition = make_inputs(batch=1, lengths=(0,))

    def loss(params):
        out = hunyuan_video.velocity(params, latents, timestep, condition, config)
        return jnp.sum(jnp.square(out))

    gradients = jax.jit(jax.grad(loss), compiler_options=COMPILER_OPTIONS)(random_params(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert bool(jnp.isfinite(leaf).all()), jax.tree_util.keystr(path)


def test_samples_with_zero_image_embeddings_are_text_to_video():
    config = dataclasses.replace(CONFIG, image_embed_dim=5)
    params = random_params(config)
    latents, timestep, condition = make_inputs(batch=2, lengths=(4, 2))
    image = np.random.default_rng(2).standard_normal((2, 3, 5)).astype(np.float32)
    image[1] = 0
    mixed = velocity(params, latents, timestep, condition._replace(image=image), config)
    mask = np.array([[True] * 3, [False] * 3])
    masked = condition._replace(image=image, image_mask=mask)
    np.testing.assert_array_equal(mixed, velocity(params, latents, timestep, masked, config))
    without = velocity(params, latents, timestep, condition, config)
    np.testing.assert_allclose(mixed[1], without[1], atol=1e-5)
    assert np.abs(mixed[0] - without[0]).max() > 0.01


def test_mesh_changes_nothing():
    """15 image tokens on a context axis of 2: one token of padding."""
    latents, timestep, condition = make_inputs()
    params = random_params()
    want = velocity(params, latents, timestep, condition, CONFIG)
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"), axis_types=auto)

    def place(x, axes):
        spec = [("fsdp", "context") if name == "embed" else None for name in axes]
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    params = jax.tree.map(place, params, hunyuan_video.partition_names(CONFIG))
    batch = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    latents, timestep, condition = jax.device_put((latents, timestep, condition), batch)
    with jax.set_mesh(mesh):
        lowered = velocity.lower(params, latents, timestep, condition, CONFIG)
        compiled = lowered.compile(COMPILER_OPTIONS)
        got = compiled(params, latents, timestep, condition)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert lowered.as_text().count("sharding_constraint") > 10
    # Modulation is computed where its kernels lie: none of [32, 6 * 32] is gathered.
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert gathers
    assert not [line for line in gathers if "32,192]" in line.split("all-gather(")[0]]


def test_bfloat16_is_close_to_float32_and_returns_float32():
    latents, timestep, condition = make_inputs()
    want = velocity(random_params(), latents, timestep, condition, CONFIG)
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    got = velocity(random_params(), latents, timestep, condition, config)
    assert got.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want)))
    assert 1e-5 < error < 0.03


def test_config_round_trip_and_diffusers_reads_it():
    config = HunyuanVideoConfig(num_layers=1, use_meanflow=True, dtype="bfloat16", remat=False)
    text = config.to_json()
    assert not {"dtype", "attention", "remat", "unroll"} & set(json.loads(text))
    back = HunyuanVideoConfig.from_json(text, dtype="bfloat16", remat=False)
    assert back == config
    theirs = HunyuanVideo15Transformer3DModel.from_config(json.loads(CONFIG_WITH_PARTS.to_json()))
    assert HunyuanVideoConfig.from_json(theirs.to_json_string()) == CONFIG_WITH_PARTS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_axes_dim": (4, 4, 4)}, "rope_axes_dim"),
        ({"rope_axes_dim": (5, 5, 6)}, "rope_axes_dim"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dtype": "float16"}, "dtype=float16"),
        ({"attention": "flash"}, "attention=flash"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"in_channels": 3}, "in_channels=3"),
    ],
)
def test_bad_configs(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **overrides)


def test_bad_config_files():
    with pytest.raises(ValueError, match="depth"):
        HunyuanVideoConfig.from_json('{"depth": 3}')
    with pytest.raises(ValueError, match="_class_name=Other"):
        HunyuanVideoConfig.from_json('{"_class_name": "Other"}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": np.zeros((4, 4, 9))}, r"condition\.text\.shape"),
        ({"text_mask": np.ones((4, 3), bool)}, r"condition\.text_mask\.shape"),
        ({"byt5": np.zeros((4, 1, 6))}, r"condition\.byt5=given"),
        ({"image_mask": np.ones((4, 1), bool)}, r"condition\.image_mask=given"),
        ({"latents": np.zeros((4, 1, 5, 3, 4))}, r"condition\.latents\.shape"),
        ({"timestep_r": np.zeros(4)}, r"condition\.timestep_r=given"),
    ],
)
def test_bad_conditions(change, message):
    latents, timestep, condition = make_inputs()
    with pytest.raises(ValueError, match=message):
        hunyuan_video.velocity({}, latents, timestep, condition._replace(**change), CONFIG)


def test_latents_must_be_whole_patches():
    latents, timestep, condition = make_inputs()
    config = dataclasses.replace(CONFIG, patch_size=2)
    with pytest.raises(ValueError, match="latents axis H=5: must be a multiple of the patch 2"):
        hunyuan_video.velocity({}, latents, timestep, condition, config)
