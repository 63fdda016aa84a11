"""Draws the clips of the moving-shapes world."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from sage_grpo_jax.worlds.moving_shapes import spec


class ClipParameters(NamedTuple):
    """What is needed to draw clips; the first six are indices into the tables of the spec."""

    size: jax.Array  # int32[N]
    colour: jax.Array  # int32[N]
    shape: jax.Array  # int32[N]
    direction: jax.Array  # int32[N]
    speed: jax.Array  # int32[N]
    background: jax.Array  # int32[N]
    start: jax.Array  # f32[N, 2], the position (x, y) in the first frame, in pixels


@jax.jit
def render(parameters: ClipParameters) -> jax.Array:
    """Draws clips.

    The edges are anti-aliased: a pixel at signed distance d (in pixels) from the outline shows
    clip(0.5 - d, 0, 1) of the shape and the rest of the background.

    Returns:
      f32[N, F, H, W, 3] in [0, 1].
    """
    chex.assert_rank(parameters.start, 2)
    chex.assert_equal_shape_prefix(list(parameters), 1)
    # Colours as [N, 1, 1, 1, 3], in 0..1.
    alpha_NxFxHxW = coverage(parameters)
    colour = jnp.asarray(spec.COLOUR_RGB / 255)[parameters.colour][:, None, None, None]
    ground = jnp.asarray(spec.BACKGROUND_RGB / 255)[parameters.background][:, None, None, None]
    return ground + alpha_NxFxHxW[..., None] * (colour - ground)


def coverage(parameters: ClipParameters) -> jax.Array:
    """How much of each pixel the shape covers: f32[N, F, H, W] in [0, 1]."""
    # Where the shape is in each frame, at constant speed: [N, F, 2], pixels.
    step = jnp.asarray(spec.DIRECTION_XY)[parameters.direction]
    step = step * jnp.asarray(spec.PIXELS_PER_FRAME)[parameters.speed][:, None]
    frame = jnp.arange(spec.NUM_FRAMES, dtype=jnp.float32)
    centre_NxFx2 = parameters.start[:, None] + frame[:, None] * step[:, None]

    # Every pixel's centre as seen from there: x [N, F, 1, W], y [N, F, H, 1].
    x = (jnp.arange(spec.WIDTH) + 0.5) - centre_NxFx2[..., 0, None, None]
    y = (jnp.arange(spec.HEIGHT) + 0.5)[:, None] - centre_NxFx2[..., 1, None, None]

    radius = jnp.asarray(spec.RADIUS)[parameters.size][:, None, None, None]
    which = parameters.shape[:, None, None, None]
    return jnp.clip(0.5 - _signed_distance(which, radius, x, y), 0.0, 1.0)


def _signed_distance(shape: jax.Array, radius: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    # All three are computed and one is taken: under jit a shape is a number, not a branch.
    disk, square, triangle = spec.signed_distances(radius, x, y, xp=jnp)
    return jnp.where(shape == 0, disk, jnp.where(shape == 1, square, triangle))
