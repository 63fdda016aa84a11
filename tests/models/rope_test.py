"""Rotary embedding against complex multiplication in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models import rope

GRID, AXES, THETA = (2, 3, 2), (4, 2, 6), 100.0


def exact_angles() -> np.ndarray:
    """[tokens, pairs] in float64, token by token."""
    rows = []
    for position in np.ndindex(*GRID):
        rows.append(
            [
                p * THETA ** (-2 * i / dim)
                for p, dim in zip(position, AXES, strict=True)
                for i in range(dim // 2)
            ]
        )
    return np.array(rows)


def exact_rotation(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None, :]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def test_angles():
    got = rope.rotary_angles(GRID, AXES, THETA)
    np.testing.assert_allclose(got, exact_angles(), atol=1e-6)


def test_rotation_gradient_and_padding():
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 2, 14, 3, 12), np.float32)
    tables = rope.rotary_tables(rope.rotary_angles(GRID, AXES, THETA), padded_length=14)
    got, pull_back = jax.vjp(lambda x: rope.apply_rotary(x, *tables), jnp.asarray(x))
    angles = np.pad(exact_angles(), ((0, 2), (0, 0)))  # padding does not turn
    np.testing.assert_allclose(got, exact_rotation(x, angles), atol=2e-6)
    # A rotation's transpose is its inverse.
    np.testing.assert_allclose(pull_back(jnp.asarray(g))[0], exact_rotation(g, -angles), atol=2e-6)


def test_neighbours_swap_with_the_same_bits_in_both_forms():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 12), np.float32) * np.float32(1e3)
    want = x.reshape(2, 5, 3, 6, 2)[..., ::-1].reshape(x.shape)
    for swap in (rope.swapped_by_rolls, rope.swapped_by_product):
        np.testing.assert_array_equal(jax.jit(swap)(x), want)


def test_float64_tables_are_rounded_once():
    grid, axes, theta = (1, 900, 2), (2, 4, 0), 10_000.0
    cos, sin = rope.float64_rotary_tables(grid, axes, theta, padded_length=1802)
    position = np.repeat(np.arange(900), 2)
    angles = np.stack([0 * position, position, position * 0.01], axis=-1)
    np.testing.assert_allclose(cos[:1800, ::2], np.cos(angles), rtol=0, atol=6e-8)
    np.testing.assert_array_equal(cos[:, ::2], cos[:, 1::2])
    np.testing.assert_allclose(sin[:1800, 1::2], np.sin(angles), rtol=0, atol=6e-8)
    np.testing.assert_array_equal(sin[:, ::2], -sin[:, 1::2])
    # Padding does not turn.
    assert np.all(cos[1800:] == 1)
    assert not np.any(sin[1800:])
