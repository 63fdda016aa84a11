"""Attention implementations against a float64 softmax, alone and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.models import attention
from sage_grpo_jax.models.attention import Qkv


def make_mesh(data: int, fsdp: int, context: int) -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, context), ("data", "fsdp", "context"), axis_types=auto)


def make_qkv(batch: int, length: int, heads: int, size: int, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, size)
    query, key, value = (rng.standard_normal(shape, np.float32) for _ in range(3))
    return [jnp.asarray(query * size**-0.5), jnp.asarray(key), jnp.asarray(value)]


def exact(query, key, value, mask) -> np.ndarray:
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, key)
    weights = np.exp(logits) * np.asarray(mask)[:, None, None, :]
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


def some_mask(batch: int, length: int) -> np.ndarray:
    mask = np.random.default_rng(1).random((batch, length)) < 0.7
    mask[:, 0] = True
    return mask


def test_xla_matches_exact_softmax():
    qkv, mask = make_qkv(2, 7, 3, 4), some_mask(2, 7)
    got = attention.attention(*qkv, jnp.asarray(mask), "xla")
    np.testing.assert_allclose(got, exact(*qkv, mask), atol=1e-6)
    got = attention.attention(*qkv, None, "xla")
    np.testing.assert_allclose(got, exact(*qkv, np.ones((2, 7))), atol=1e-6)


def test_all_masked_keys_are_finite_with_finite_gradients():
    qkv = make_qkv(1, 5, 1, 4)

    def loss(*qkv):
        return attention.attention(*qkv, jnp.zeros((1, 5), bool), "xla").sum()

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(*qkv)
    assert all(bool(jnp.isfinite(x).all()) for x in (value, *gradients))


def test_moving_valid_keys_to_the_front_changes_nothing():
    (query, key, value), mask = make_qkv(3, 9, 2, 4), some_mask(3, 9)
    key_first, value_first, lengths = attention.valid_keys_first(key, value, jnp.asarray(mask))
    front = np.arange(9) < np.asarray(lengths)[:, None]
    np.testing.assert_allclose(
        exact(query, key_first, value_first, front), exact(query, key, value, mask), atol=1e-12
    )


# 130 is no multiple of the block size: the kernel sees padding under the mask. 50 keys are less
# than a block, 600 more than one; the fewer they are, the larger are the gradients.
@pytest.mark.parametrize(
    ("mesh_shape", "keys", "atol"),
    [(None, 130, 2e-5), ((1, 2, 2), 130, 2e-5), (None, 50, 1e-4), ((1, 2, 2), 600, 2e-5)],
)
def test_splash_kernel_matches_exact_softmax_and_xla_gradients(mesh_shape, keys, atol):
    query, mask = make_qkv(2, 130, 2, 128)[0], jnp.asarray(some_mask(2, keys))
    qkv = [query, *make_qkv(2, keys, 2, 128)[1:]]
    weights = jnp.cos(jnp.arange(128.0))

    def loss(function, *qkv):
        out = function(*qkv)
        return jnp.sum(jnp.square(out) * weights), out

    def splash(*qkv):
        return attention.splash_attention(*qkv, mask, interpret=True)

    def run():
        return jax.jit(jax.value_and_grad(lambda *x: loss(splash, *x), (0, 1, 2), True))(*qkv)

    if mesh_shape is None:
        (_, out), gradients = run()
    else:
        with jax.set_mesh(make_mesh(*mesh_shape)):
            (_, out), gradients = run()
    np.testing.assert_allclose(out, exact(*qkv, mask), atol=2e-6)

    def plain(*x):
        return loss(lambda *y: attention.xla_attention(*y, mask), *x)[0]

    for got, want in zip(gradients, jax.grad(plain, (0, 1, 2))(*qkv), strict=True):
        np.testing.assert_allclose(got, want, atol=atol)


def test_splash_in_bfloat16_does_not_see_the_precision_of_the_recipe():
    """Mosaic has no float32 contraction of bfloat16; forward, backward and under remat and scan."""
    qkv = [x.astype(jnp.bfloat16) for x in make_qkv(1, 128, 1, 128)]
    mask = jnp.asarray(some_mask(1, 128))

    def layer(x, _):
        out = attention.splash_attention(x, *qkv[1:], mask, interpret=True)
        return out.astype(x.dtype), None

    def loss(query):
        with jax.default_matmul_precision("highest"):
            out, _ = jax.lax.scan(jax.checkpoint(layer), query, None, length=2)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    jaxpr = str(jax.make_jaxpr(jax.value_and_grad(loss))(qkv[0]))
    assert jaxpr.count("pallas_call") >= 3
    assert "dot_general" in jaxpr
    assert "HIGHEST" not in jaxpr


def test_joint_attention_on_a_mesh_exchanges_tokens_for_heads():
    image, text = Qkv(*make_qkv(4, 6, 2, 4)), Qkv(*make_qkv(4, 3, 2, 4, seed=2))
    mask = jnp.asarray(some_mask(4, 9))
    want = jax.jit(attention.joint_attention)(image, text, mask)
    with jax.set_mesh(make_mesh(1, 2, 2)):
        tokens = jax.NamedSharding(
            jax.sharding.get_mesh(), jax.P(("data", "fsdp"), "context", None, None)
        )
        image = jax.device_put(image, tokens)
        compiled = jax.jit(attention.joint_attention).lower(image, text, mask).compile()
        got = compiled(image, text, mask)
    assert "all-to-all" in compiled.as_text()
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_self_attention_on_a_mesh_exchanges_tokens_for_heads():
    qkv, mask = make_qkv(4, 6, 2, 4), jnp.asarray(some_mask(4, 6))
    want = exact(*qkv, mask).reshape(4, 6, 8)
    plain = attention.self_attention(Qkv(*qkv), mask)
    np.testing.assert_allclose(plain, want, atol=1e-6)
    with jax.set_mesh(make_mesh(1, 2, 2)):
        compiled = jax.jit(attention.self_attention).lower(Qkv(*qkv), mask).compile()
        got = compiled(Qkv(*qkv), mask)
    assert "all-to-all" in compiled.as_text()
    np.testing.assert_allclose(got, want, atol=1e-6)


# Batch, tokens: both divide over a mesh of (1, 2, 2); one does not; neither does.
@pytest.mark.parametrize(("batch", "length"), [(4, 6), (3, 6), (4, 5), (3, 5)])
def test_cross_attention_on_a_mesh_moves_nothing(batch, length):
    query, _, _ = make_qkv(batch, length, 3, 4)
    _, key, value = make_qkv(batch, 7, 3, 4, seed=2)
    want = exact(query, key, value, np.ones((batch, 7))).reshape(batch, length, 12)
    np.testing.assert_allclose(attention.cross_attention(query, key, value), want, atol=1e-6)

    def pull_back(query, key, value):
        out, back = jax.vjp(attention.cross_attention, query, key, value)
        return out, back(jnp.cos(out))

    _, want_gradients = pull_back(query, key, value)
    with jax.set_mesh(make_mesh(1, 2, 2)):
        compiled = jax.jit(attention.cross_attention).lower(query, key, value).compile()
        _, gradients = jax.jit(pull_back)(query, key, value)
        got = compiled(query, key, value)
    np.testing.assert_allclose(got, want, atol=1e-6)
    for one, other in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert not [line for line in compiled.as_text().splitlines() if " all-to-all(" in line]


def test_heads_must_divide_over_context():
    image = text = Qkv(*make_qkv(2, 4, 3, 4))
    for call in (
        attention.joint_attention,
        lambda image, _, mask: attention.self_attention(image, mask),
    ):
        with jax.set_mesh(make_mesh(1, 1, 2)), pytest.raises(ValueError, match="_heads=3"):
            call(image, text, None)


@pytest.mark.parametrize(
    ("platform", "head_size", "dtype", "want"),
    [
        ("tpu", 128, jnp.bfloat16, "splash"),
        ("tpu", 32, jnp.float32, "xla"),
        ("gpu", 128, jnp.bfloat16, "cudnn"),
        ("gpu", 128, jnp.float32, "xla"),
        ("cpu", 128, jnp.bfloat16, "xla"),
    ],
)
def test_auto_goes_by_the_platform_of_the_mesh(platform, head_size, dtype, want):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((2,), ("context",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.resolve("auto", head_size, dtype) == want


def test_unknown_implementation():
    with pytest.raises(ValueError, match="attention='flash'"):
        attention.resolve("flash", 128, jnp.float32)
