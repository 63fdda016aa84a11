import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sage_grpo_jax.models import hunyuan_video, lora

CONFIG = hunyuan_video.HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    text_embed_dim=6,
    text_embed_2_dim=None,
    image_embed_dim=None,
    rope_axes_dim=(4, 2, 2),
)
LORA = lora.LoraConfig(rank=3, alpha=7.5)


def random_like(tree, seed: int, scale: float = 0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), tree
    )


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: hunyuan_video.init_params(CONFIG, jax.random.key(0)))
    return random_like(shapes, 1)


@pytest.fixture(scope="module")
def adapters(params):
    return random_like(lora.abstract_adapters(params, LORA, hunyuan_video), 2)


def inputs():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    condition = hunyuan_video.Condition(draw(2, 5, 6), jnp.arange(5) < jnp.array([[5], [3]]))
    return draw(2, 2, 3, 4, 4), jnp.array([900.0, 20.0]), condition


@functools.partial(jax.jit, static_argnames=("config", "scale"))
def velocity(params, adapters=None, config=CONFIG, scale=LORA.scale):
    return hunyuan_video.velocity(params, *inputs(), config, adapters, scale)


def float64_merge(params, adapters):
    """W + alpha / r A B, written out for one layer and one target at a time."""
    flat = traverse_util.flatten_dict(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
    given = traverse_util.flatten_dict(jax.tree.map(np.asarray, adapters))
    for stream in ("image", "text"):
        for target in ("query", "key", "value", "proj", "mlp/in", "mlp/out"):
            path = ("blocks", stream, *target.split("/"))
            for layer in range(CONFIG.num_layers):
                a = given[(*path, "down")][layer].astype(np.float64)
                b = given[(*path, "up")][layer].astype(np.float64)
                flat[(*path, "kernel")][layer] += 7.5 / 3 * (a @ b)
    return jax.tree.map(jnp.float32, traverse_util.unflatten_dict(flat))


def test_fresh_adapters_change_nothing_bit_for_bit(params):
    fresh = lora.init_adapters(params, LORA, jax.random.key(4), hunyuan_video)
    assert all(np.any(np.asarray(x)) for p, x in traverse_util.flatten_dict(fresh).items()
               if p[-1] == "down")  # fmt: skip
    np.testing.assert_array_equal(velocity(params, fresh), velocity(params))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    np.testing.assert_array_equal(
        velocity(half, fresh, config=config), velocity(half, config=config)
    )


def test_fresh_adapters_are_normal_and_independent():
    """A of standard deviation 1/sqrt(in) in every leaf, no two of them alike; B zero."""
    config = dataclasses.replace(CONFIG, num_attention_heads=8, mlp_ratio=4.0)
    shapes = jax.eval_shape(lambda: hunyuan_video.init_params(config, jax.random.key(0)))
    wide = lora.LoraConfig(rank=16, alpha=1.0)

    def draw(seed: int):
        key = jax.random.key(seed)
        return traverse_util.flatten_dict(lora.init_adapters(shapes, wide, key, hunyuan_video))

    fresh = draw(4)
    downs = {path: np.asarray(x) for path, x in fresh.items() if path[-1] == "down"}
    assert len(downs) == 12
    for path, down in downs.items():
        fan_in = 256 if path[-3:-1] == ("mlp", "out") else 64
        assert down.shape == (3, fan_in, 16)
        assert down.std() == pytest.approx(fan_in**-0.5, rel=0.1)
        assert abs(down.mean()) < 0.1 * fan_in**-0.5
        assert not np.any(fresh[(*path[:-1], "up")])
    assert len({down.flat[0] for down in downs.values()}) == 12
    other = draw(5)
    assert all(np.any(other[path] != down) for path, down in downs.items())


@pytest.mark.parametrize("form", [{}, {"unroll": True}, {"remat": False}])
def test_adapters_inside_the_model_equal_merged_weights(params, adapters, form):
    config = dataclasses.replace(CONFIG, **form)
    got = velocity(params, adapters, config=config)
    want = velocity(float64_merge(params, adapters))
    assert np.abs(got - velocity(params)).max() > 0.1
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(velocity(lora.merge(params, adapters, LORA.scale)), want, atol=2e-5)


def test_gradients_are_those_of_the_merged_model_by_the_chain_rule(params, adapters):
    """dA = alpha/r dW B^T and dB = alpha/r A^T dW, with dW the gradient of the merged weights."""
    target = np.random.default_rng(5).standard_normal((2, 2, 3, 4, 4)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="merged")
    def gradient(weights, merged):
        def loss(w):
            out = velocity(w) if merged else velocity(params, w)
            return jnp.sum((out - target) ** 2)

        return jax.grad(loss)(weights)

    got = traverse_util.flatten_dict(gradient(adapters, merged=False))
    full = traverse_util.flatten_dict(gradient(float64_merge(params, adapters), merged=True))
    given = traverse_util.flatten_dict(adapters)
    assert len(got) == 2 * 12
    for path in lora.adapted_paths(LORA, hunyuan_video):
        dw = np.asarray(full[(*path, "kernel")], np.float64)
        want = {
            "down": 2.5 * np.einsum("lio,lro->lir", dw, given[(*path, "up")]),
            "up": 2.5 * np.einsum("lir,lio->lro", given[(*path, "down")], dw),
        }
        for part, value in want.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(got[(*path, part)] / scale, value / scale, atol=2e-5)


def test_number_of_adapter_parameters_of_the_full_model():
    """r = 64 over attention and MLP of both streams: 255 million; r = 8: 31.9 million."""
    shapes = jax.eval_shape(
        lambda: hunyuan_video.init_params(hunyuan_video.HunyuanVideoConfig(), jax.random.key(0))
    )
    for rank, millions in ((8, 31.9), (64, 254.8)):
        tree = lora.abstract_adapters(shapes, lora.LoraConfig(rank=rank, alpha=1.0), hunyuan_video)
        count = sum(x.size for x in jax.tree.leaves(tree))
        assert count / 1e6 == pytest.approx(millions, abs=0.05)
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}


def test_partition_names_fit_the_adapters(params):
    config = lora.LoraConfig(rank=2, alpha=2.0, targets=("value", "mlp/out"))
    names = traverse_util.flatten_dict(lora.partition_names(config, hunyuan_video))
    shapes = traverse_util.flatten_dict(lora.abstract_adapters(params, config, hunyuan_video))
    assert names.keys() == shapes.keys()
    assert {path[1:-1] for path in names} == {
        (stream, *rest) for stream in ("image", "text") for rest in (("value",), ("mlp", "out"))
    }
    assert all(len(names[path]) == len(shapes[path].shape) for path in names)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"alpha": float("nan")}, "lora.alpha"),
        ({"targets": ("query", "mlp")}, "lora.targets"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": ("query", "query")}, "lora.targets"),
        ({"targets": ("query", "blocks/text/query")}, "lora.targets"),
    ],
)
def test_bad_values_are_refused(values, field):
    with pytest.raises(ValueError, match=field):
        lora.adapted_paths(lora.LoraConfig(**{"rank": 2, "alpha": 2.0, **values}), hunyuan_video)
