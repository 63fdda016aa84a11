"""The moving-shapes world: a procedural world of captioned clips whose manifold is known exactly.

A clip shows one shape that moves at constant speed in one of four directions over a plain
background: 17 frames of 32x32 RGB at 8 frames a second. A handful of parameters says everything
about it, so that the distance of any video to the world can be measured (`manifold_distance`).

The constants and the captions live in `spec`, which does not import JAX; the renderer in
`rendering`, the distance in `fitting`. All of it is reached from here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.worlds.moving_shapes import spec
from sage_grpo_jax.worlds.moving_shapes.fitting import fit, manifold_distance
from sage_grpo_jax.worlds.moving_shapes.rendering import ClipParameters, render
from sage_grpo_jax.worlds.moving_shapes.spec import (
    Words,
    held_out_captions,
    parse_caption,
    split_captions,
    train_captions,
)

__all__ = [
    "ClipParameters",
    "Words",
    "caption",
    "captions",
    "fit",
    "held_out_captions",
    "manifold_distance",
    "parameters_from_captions",
    "parse_caption",
    "render",
    "sample_parameters",
    "split_captions",
    "to_uint8",
    "train_captions",
]


def sample_parameters(key: jax.Array, n: int, split: str = "train") -> ClipParameters:
    """Draws the parameters of n clips, uniform over the combinations of a split. Can be jitted.

    Args:
      key: typed PRNG key; the same key gives the same clips.
      n: number of clips.
      split: one of `spec.SPLITS`.
    """
    # Colour, shape and direction together, since a split is made of triples; the rest is free.
    allowed = _triples(split)
    keys = jax.random.split(key, 5)
    triple = jax.random.randint(keys[0], (n,), 0, len(allowed))
    colour, shape, direction = jnp.asarray(allowed)[triple].T

    size = jax.random.randint(keys[1], (n,), 0, len(spec.SIZES))
    speed = jax.random.randint(keys[2], (n,), 0, len(spec.SPEEDS))
    background = jax.random.randint(keys[3], (n,), 0, len(spec.BACKGROUNDS))
    start = _sample_start(keys[4], shape, size, direction, speed)
    return ClipParameters(size, colour, shape, direction, speed, background, start)


def parameters_from_captions(texts: list[str], key: jax.Array) -> ClipParameters:
    """Parameters of one clip per caption, with start positions drawn from `key`."""
    chosen = np.array([spec.indices(parse_caption(text)) for text in texts], np.int32).reshape(
        -1, 6
    )
    size, colour, shape, direction, speed, background = jnp.asarray(chosen.reshape(-1, 6)).T
    start = _sample_start(key, shape, size, direction, speed)
    return ClipParameters(size, colour, shape, direction, speed, background, start)


def caption(parameters: ClipParameters) -> str:
    """The caption of one clip (every field of `parameters` is a scalar; start is [2])."""
    chosen = parameters[:6]
    return spec.caption(
        Words(*(words[int(i)] for words, i in zip(spec.CHOICES, chosen, strict=True)))
    )


def captions(parameters: ClipParameters) -> list[str]:
    """The captions of N clips."""
    # Off the device once, and not for every index.
    parameters = jax.tree.map(np.asarray, parameters)
    return [
        caption(ClipParameters(*(field[i] for field in parameters)))
        for i in range(len(parameters.shape))
    ]


def to_uint8(videos: jax.Array) -> np.ndarray:
    """Videos in [0, 1] as uint8 pixels, rounded to nearest."""
    return np.asarray(jnp.round(jnp.clip(videos, 0, 1) * 255).astype(jnp.uint8))


def _triples(split: str) -> np.ndarray:
    """The (colour, shape, direction) triples of a split: int32[K, 3]."""
    sizes = (len(spec.COLOURS), len(spec.SHAPES), len(spec.DIRECTIONS))
    triples = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, 3)
    return triples[spec.in_split(split, *triples.T)].astype(np.int32)


def _sample_start(
    key: jax.Array, shape: jax.Array, size: jax.Array, direction: jax.Array, speed: jax.Array
) -> jax.Array:
    # Uniform over the starts from which the object stays in the frame.
    low, high = (jnp.asarray(table) for table in spec.start_range_table())
    index = (shape, size, direction, speed)
    share = jax.random.uniform(key, (*shape.shape, 2))
    return low[index] + share * (high[index] - low[index])
