"""The constants and the language of the moving-shapes world.

The one place that the JAX renderer and the numpy reward share. It imports numpy only, so that a
reward server starts without JAX.

Geometry is in pixels: the origin is the top left corner of the frame, x runs right, y runs down,
the centre of pixel (row i, column j) is (j + 0.5, i + 0.5).
"""

import itertools
import re
import types
from typing import Any, NamedTuple

import numpy as np

VERSION = 1

NUM_FRAMES = 17
HEIGHT = 32
WIDTH = 32
FPS = 8

SHAPES = ("disk", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "fast")
BACKGROUNDS = ("dark", "light")

# RGB in 0..255. The closest two colours (blue, purple) are 128 apart, and every colour is at least
# 154 away from both greys.
COLOUR_RGB = np.array(
    [
        (230, 38, 38),
        (26, 191, 51),
        (26, 77, 242),
        (242, 217, 26),
        (140, 38, 191),
        (26, 204, 230),
    ],
    np.float32,
)
BACKGROUND_RGB = np.array([(38, 38, 38), (217, 217, 217)], np.float32)
RADIUS = np.array([4.0, 6.0], np.float32)
PIXELS_PER_FRAME = np.array([0.4, 0.9], np.float32)
DIRECTION_XY = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], np.float32)

# A square of half side 0.9 radius and a triangle of inradius 0.7 radius cover about the area of the
# disk. The triangle is equilateral and points up; the position of a shape is its centroid.
SQUARE_HALF_SIDE = 0.9
TRIANGLE_INRADIUS = 0.7

# How far a shape of radius 1 reaches from its position: left, right, up, down.
_TRIANGLE_HALF_BASE = TRIANGLE_INRADIUS * 3.0**0.5
EXTENT = np.array(
    [
        (1.0, 1.0, 1.0, 1.0),
        (SQUARE_HALF_SIDE,) * 4,
        (_TRIANGLE_HALF_BASE, _TRIANGLE_HALF_BASE, 2 * TRIANGLE_INRADIUS, TRIANGLE_INRADIUS),
    ],
    np.float32,
)
# The half pixel of the anti-aliasing ramp that lies outside the outline.
MARGIN = 0.5

_CAPTION = re.compile(
    r"an? (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) moves (?P<direction>\w+), "
    r"(?P<speed>\w+), over an? (?P<background>\w+) background"
)


class Words(NamedTuple):
    """The six words of a caption."""

    size: str
    colour: str
    shape: str
    direction: str
    speed: str
    background: str


CHOICES = Words(SIZES, COLOURS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)
# Where colour, shape and direction stand in `Words`.
_TRIPLE = tuple(Words._fields.index(name) for name in ("colour", "shape", "direction"))


def caption(words: Words) -> str:
    """The caption of six words, as in "a large red disk moves left, fast, over a dark background".

    Raises ValueError for a word that the world does not know.
    """
    _check(words)
    return (
        f"a {words.size} {words.colour} {words.shape} moves {words.direction}, {words.speed}, "
        f"over a {words.background} background"
    )


def parse_caption(text: str) -> Words:
    """The words of a caption; the inverse of `caption`, blind to case, outer space and full stop.

    Raises ValueError for a text that is no caption, or has an unknown word.
    """
    match = _CAPTION.fullmatch(text.strip().rstrip(".").lower())
    if match is None:
        raise ValueError(f"caption {text!r} does not read like {example_caption()!r}")
    words = Words(**match.groupdict())
    _check(words)
    return words


def example_caption() -> str:
    """A caption to show what they look like."""
    return caption(Words("large", "red", "disk", "left", "fast", "dark"))


def all_words() -> list[Words]:
    """Every combination of words, in a fixed order."""
    return [Words(*combination) for combination in itertools.product(*CHOICES)]


def held_out(colour: int, shape: int, direction: int) -> bool:
    """Whether a (colour, shape, direction) triple, given by indices, is kept from training.

    One direction for every (colour, shape), a quarter of all triples; every pair of words still
    occurs in training. Works on arrays too.
    """
    return (colour + shape) % len(DIRECTIONS) == direction


def tested(colour: int, shape: int, direction: int) -> bool:
    """Whether a held-out triple belongs to the test split; the others are for validation.

    Half of them, and every colour, shape and direction occurs in both. Works on arrays too.
    """
    return held_out(colour, shape, direction) & ((colour // 3 + shape) % 2 == 1)


# What each split holds: choices are made on `validation`, results are reported on `test`.
SPLITS = ("train", "validation", "test", "held_out", "all")


def in_split(split: str, colour: int, shape: int, direction: int) -> bool:
    """Whether a triple, given by indices, belongs to one of SPLITS. Works on arrays too.

    `held_out` is validation and test together, `all` is everything.

    Raises:
      ValueError: there is no such split.
    """
    triple = (colour, shape, direction)
    if split == "train":
        return ~np.asarray(held_out(*triple))
    if split == "validation":
        return np.asarray(held_out(*triple)) & ~np.asarray(tested(*triple))
    if split == "test":
        return np.asarray(tested(*triple))
    if split == "held_out":
        return np.asarray(held_out(*triple))
    if split == "all":
        return np.ones_like(np.asarray(held_out(*triple)))
    raise ValueError(f"split is {split!r}, allowed: {', '.join(SPLITS)}")


def split_captions(split: str) -> list[str]:
    """The captions of a split, in a fixed order.

    Raises:
      ValueError: there is no such split.
    """
    places = [indices(words) for words in all_words()]
    inside = [in_split(split, *(place[i] for i in _TRIPLE)) for place in places]
    return [caption(words) for words, wanted in zip(all_words(), inside, strict=True) if wanted]


def train_captions() -> list[str]:
    """The captions of the training combinations, in a fixed order."""
    return split_captions("train")


def held_out_captions() -> list[str]:
    """The captions of the combinations that training never sees, in a fixed order."""
    return split_captions("held_out")


def vocabulary() -> list[str]:
    """Every word that captions use, in a fixed order."""
    glue = ["a", "moves", "over", "background"]
    return glue + [word for choices in CHOICES for word in choices]


def indices(words: Words) -> tuple[int, ...]:
    """The place of each word among its choices, in the order of `Words`."""
    return tuple(choices.index(word) for choices, word in zip(CHOICES, words, strict=True))


def signed_distances(
    radius: Any, x: Any, y: Any, xp: types.ModuleType = np
) -> tuple[Any, Any, Any]:
    """Signed distances, in pixels, of the points (x, y) from a disk, a square and a triangle at 0.

    Negative inside. Outside the corners of the square and the triangle it is the distance to the
    nearest edge line, which keeps the corners sharp. Arrays broadcast; `xp` is numpy or jax.numpy.
    """
    disk = xp.sqrt(xp.maximum(x * x + y * y, 1e-12)) - radius
    square = xp.maximum(xp.abs(x), xp.abs(y)) - SQUARE_HALF_SIDE * radius
    # The base at the bottom, and the two other edges at once by the symmetry in x.
    sides = 0.5 * 3.0**0.5 * xp.abs(x) - 0.5 * y
    triangle = xp.maximum(y, sides) - TRIANGLE_INRADIUS * radius
    return disk, square, triangle


def start_range_table(num_frames: int = NUM_FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """The start positions for which the whole object stays in the frame in every frame.

    Returns:
      (low, high), each f32[shape, size, direction, speed, 2], positions (x, y) in pixels.
    """
    # How far the object reaches, [shape, 1, 1, 1, side] times [size, ...], and where it gets to in
    # the clip, [direction, speed, 2]; a motion to the left or up has negative travel.
    reach = EXTENT[:, None, None, None] * RADIUS[None, :, None, None, None] + MARGIN
    travel = DIRECTION_XY[:, None] * PIXELS_PER_FRAME[None, :, None] * (num_frames - 1)
    frame = np.array([WIDTH, HEIGHT], np.float32)

    # The first frame decides on one side, the last on the other.
    low = reach[..., [0, 2]] - np.minimum(travel, 0)
    high = frame - reach[..., [1, 3]] - np.maximum(travel, 0)
    return low.astype(np.float32), high.astype(np.float32)


def _check(words: Words) -> None:
    for field, choices, word in zip(Words._fields, CHOICES, words, strict=True):
        if word not in choices:
            raise ValueError(f"caption {field} is {word!r}, allowed: {', '.join(choices)}")
