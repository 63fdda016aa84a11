"""Rotary position embedding over the (time, height, width) grid of image tokens.

Interleaved pairs (channels 2i and 2i + 1 form one rotation), integer grid positions, tokens in
t-major order. The tables come from float32 angles as in HunyuanVideo-1.5 (diffusers
`HunyuanVideo15RotaryPosEmbed`), or from float64 ones as in Wan (`WanRotaryPosEmbed`).
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models.layers import current_platform


def rotary_angles(
    grid: tuple[int, int, int], axes_dim: tuple[int, int, int], theta: float
) -> jax.Array:
    """Angles of every pair of channels at every token.

    Args:
      grid: number of tokens along time, height and width.
      axes_dim: channels that encode each axis; even, their sum is the head size.
      theta: base of the frequencies.

    Returns:
      float32 [t * h * w, sum(axes_dim) / 2], radians.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        # float32 in this order of operations, as the reference computes its frequencies.
        exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        powers = np.power(theta, exponent.astype(np.float64)).astype(np.float32)
        position = jax.lax.broadcasted_iota(jnp.float32, grid, axis).reshape(-1, 1)
        angles.append(position * (np.float32(1.0) / powers))
    return jnp.concatenate(angles, axis=-1)


def rotary_tables(angles_NxK: jax.Array, padded_length: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and signed sine per channel: float32 [padded_length, 2K]; padding rotates by zero.

    The sine carries the sign of the rotation (minus on even channels), so that `apply_rotary` is
    two products and a swap of neighbours.
    """
    n, k = angles_NxK.shape
    angles = jnp.pad(angles_NxK, ((0, padded_length - n), (0, 0)))
    cos = jnp.repeat(jnp.cos(angles), 2, axis=-1)
    sin = jnp.stack([-jnp.sin(angles), jnp.sin(angles)], axis=-1).reshape(padded_length, 2 * k)
    return cos, sin


def float64_rotary_tables(
    grid: tuple[int, int, int], axes_dim: tuple[int, int, int], theta: float, padded_length: int
) -> tuple[jax.Array, jax.Array]:
    """`rotary_tables(rotary_angles(...))`, but computed in float64 and rounded once, at the end.

    Positions of one axis are few: their tables are constants, spread over the grid on the device.
    """
    cosines, sines = [], []
    for axis, (size, dim) in enumerate(zip(grid, axes_dim, strict=True)):
        angles = np.arange(size)[:, None] * theta ** (-np.arange(0, dim, 2) / max(dim, 1))
        sine = np.stack([-np.sin(angles), np.sin(angles)], axis=-1).reshape(size, dim)
        for tables, table in ((cosines, np.repeat(np.cos(angles), 2, axis=-1)), (sines, sine)):
            lone = [size if other == axis else 1 for other in range(3)]
            table = jnp.asarray(table, jnp.float32).reshape(*lone, dim)
            tables.append(jnp.broadcast_to(table, (*grid, dim)))

    shape = (math.prod(grid), sum(axes_dim))
    cos, sin = (jnp.concatenate(tables, axis=-1).reshape(shape) for tables in (cosines, sines))
    padding = ((0, padded_length - shape[0]), (0, 0))
    return jnp.pad(cos, padding, constant_values=1.0), jnp.pad(sin, padding)


@jax.custom_vjp
def apply_rotary(x_BxNxHxD: jax.Array, cos_NxD: jax.Array, sin_NxD: jax.Array) -> jax.Array:
    """Rotates the channel pairs of queries or keys; float32. The tables get no gradient."""
    chex.assert_rank([x_BxNxHxD, cos_NxD, sin_NxD], [4, 2, 2])
    swap = swapped_by_product if current_platform() == "tpu" else swapped_by_rolls
    return x_BxNxHxD * cos_NxD[:, None, :] + swap(x_BxNxHxD) * sin_NxD[:, None, :]


def swapped_by_rolls(x: jax.Array) -> jax.Array:
    """Channels 2i and 2i + 1 of the last axis exchanged; every access is contiguous."""
    even = jnp.arange(x.shape[-1]) % 2 == 0
    return jnp.where(even, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))


def swapped_by_product(x: jax.Array) -> jax.Array:
    """The same bits as a product with a permutation, for finite float32 numbers.

    A roll of the last axis is made of slices one lane wide, which a TPU keeps in memory padded to
    its 128 lanes: most of the temporaries of an update. The highest precision makes products with
    0 and 1 exact.
    """
    neighbours = np.arange(x.shape[-1]) ^ 1
    permutation = jnp.asarray(np.eye(x.shape[-1], dtype=np.float32)[neighbours])
    return jnp.matmul(x, permutation, precision=jax.lax.Precision.HIGHEST)


def _forward(
    x: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return apply_rotary(x, cos, sin), (cos, sin)


def _backward(
    tables: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    # The transpose of a rotation is the rotation back; derived automatically it would be a slow
    # chain of pads and slices.
    cos, sin = tables
    return apply_rotary(gradient, cos, -sin), None, None


apply_rotary.defvjp(_forward, _backward)
