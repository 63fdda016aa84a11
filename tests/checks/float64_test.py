"""Programs with float32 written into them, evaluated in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.checks import float64


def narrow_program(x, table):
    """Casts, a product that asks for float32, a scan, a rule of its own, an integer path."""
    rows = jnp.take(table, jnp.arange(3), axis=0).astype(jnp.bfloat16)
    y = jnp.einsum("bi,ij->bj", x.astype(jnp.bfloat16), rows, preferred_element_type=jnp.float32)

    def body(carry, row):
        carry = jax.nn.silu(carry + row.astype(jnp.float32))
        return carry, jax.nn.softmax(carry, axis=-1)

    carry, weights = jax.lax.scan(body, y, table)
    return {"sum": jnp.sum(jax.nn.relu(carry) * 0.1), "weights": weights}


def wide_program(x, table):
    """The same in NumPy, float64."""
    carry, weights = x @ table[:3], []
    for row in table:
        carry = carry + row
        carry = carry / (1 + np.exp(-carry))
        weights.append(np.exp(carry) / np.exp(carry).sum(-1, keepdims=True))
    return np.sum(np.maximum(carry, 0) * np.float64(np.float32(0.1))), np.stack(weights)


def test_in_float64_widens_everything():
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((2, 3)), rng.standard_normal((5, 4))
    narrow = x.astype(np.float32), table.astype(np.float32)
    wide = float64.in_float64(narrow_program, *narrow)
    with jax.enable_x64(True):
        found = jax.jit(wide)(x, table)
        slope = jax.grad(lambda x: wide(x, table)["sum"])(x)
    total, weights = wide_program(x, table)
    assert found["sum"].dtype == np.float64
    np.testing.assert_allclose(found["sum"], total, rtol=1e-14)
    np.testing.assert_allclose(found["weights"], weights, rtol=1e-13)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        difference = wide_program(x + step, table)[0] - wide_program(x - step, table)[0]
        assert slope[index] == pytest.approx(difference / 2e-6, abs=1e-8)
    with pytest.raises(ValueError, match="shapes"):
        wide(x[:1], table)


def test_in_float64_adds_up_segments():
    values, owner = np.random.default_rng(0).standard_normal(6), np.array([0, 2, 0, 1, 2, 2])
    wide = float64.in_float64(
        lambda x: jax.ops.segment_sum(jnp.sin(x), owner, 3), values.astype(np.float32)
    )
    with jax.enable_x64(True):
        found = wide(values)
        slope = jax.grad(lambda x: wide(x)[2])(values)
    wanted = [np.sin(values[owner == i]).sum() for i in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-14)
    np.testing.assert_allclose(slope, np.where(owner == 2, np.cos(values), 0), rtol=1e-14)


def test_in_float64_refuses_what_depends_on_bits():
    wide = float64.in_float64(
        lambda x: jax.lax.bitcast_convert_type(x, jnp.int32), np.ones(2, np.float32)
    )
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="bitcast_convert_type"):
        wide(np.ones(2))
