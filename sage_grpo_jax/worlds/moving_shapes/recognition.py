"""Which shape a person would see: every frame of a clip by itself, from its pixels only.

Every frame is reduced to how much of each pixel is covered: its projection on the line from the
colour of its border to that of its most different pixels. The silhouettes of the world's shapes, at
many radii and places between the pixels, are laid over it; the one with the highest normalised
correlation names the shape. Neither caption nor the other frames are looked at, so that a shape
that turns into another one from frame to frame is found (the best fit of a whole clip,
`fitting`, averages that away). No reward uses this module.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sage_grpo_jax.worlds.moving_shapes import spec

_RADII = np.arange(3.0, 7.01, 0.5)
_PHASES = (-0.375, -0.125, 0.125, 0.375)  # of a centre between two pixels
_SIDE = 21  # pixels; holds the largest silhouette wherever its centre lies in the middle pixel
_HALF = _SIDE // 2
_SEARCH = (-1, 0, 1)  # pixels around the centroid at which a silhouette may stand
_BRIGHTEST = 12  # pixels whose mean is the colour of the object; the smallest shape covers 40
_CHUNK = 512  # frames at a time; bounds memory to about 30 MB


class Identity(NamedTuple):
    """How often the captioned shape is seen; every field float64, 0 to 1."""

    frames: float  # of all frames
    first_frame: float  # of all first frames
    clips: float  # of all clips: those in which every frame shows it


def identity(videos_NxFxHxWx3: np.ndarray, captions: list[str]) -> Identity:
    """How often the captioned shape is the one that is seen.

    Args:
      videos_NxFxHxWx3: uint8 clips of the world's height and width.
      captions: of each clip.

    Raises:
      ValueError: other pixels, or a text that is no caption of the world.
    """
    wanted = np.array([spec.SHAPES.index(spec.parse_caption(text).shape) for text in captions])
    # [N, F]; a clip is right where all of its frames are.
    right = recognise(videos_NxFxHxWx3) == wanted[:, None]
    return Identity(
        frames=float(right.mean()),
        first_frame=float(right[:, 0].mean()),
        clips=float(right.all(axis=1).mean()),
    )


def recognise(videos_NxFxHxWx3: np.ndarray) -> np.ndarray:
    """The shape that each frame shows, an index into `spec.SHAPES`; int [N, F].

    Args:
      videos_NxFxHxWx3: uint8 clips of the world's height and width.

    Raises:
      ValueError: other pixels.
    """
    video, size = videos_NxFxHxWx3, (spec.HEIGHT, spec.WIDTH, 3)
    if video.dtype != np.uint8 or video.ndim != 5 or video.shape[2:] != size:
        raise ValueError(
            f"videos: got {video.dtype} {list(video.shape)}; allowed: uint8 [N, F, *{size}]"
        )
    frames = video.reshape(-1, *video.shape[2:])
    parts = [_best_shape(frames[i : i + _CHUNK]) for i in range(0, len(frames), _CHUNK)]
    return np.concatenate(parts).reshape(video.shape[:2])


def _best_shape(frames_KxHxWx3: np.ndarray) -> np.ndarray:
    """The index of the best silhouette's shape; int [K]."""
    # The best correlation with any silhouette of each shape: [K, shape].
    coverage = _coverage(frames_KxHxWx3.astype(np.float32) / 255)
    silhouettes, shapes = _silhouettes()
    best = np.full((len(coverage), len(spec.SHAPES)), -np.inf, np.float32)
    for window in _windows(coverage):
        # The energy of a frame is a factor of all its correlations: the order does not need it.
        overlap = window.reshape(len(window), -1) @ silhouettes.T
        for shape in range(len(spec.SHAPES)):
            best[:, shape] = np.maximum(best[:, shape], overlap[:, shapes == shape].max(axis=1))
    return best.argmax(axis=1)


def _coverage(frames_KxHxWx3: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers: f32[K, H, W] in 0..1."""
    v = frames_KxHxWx3
    # Shapes of the world stay inside the frame, so the median of its border is the background.
    border = np.concatenate([v[:, 0], v[:, -1], v[:, :, 0], v[:, :, -1]], axis=1)
    above = v - np.median(border, axis=1)[:, None, None]

    # The colour is the mean of the most different pixels; no palette is assumed.
    pixels = above.reshape(len(v), -1, 3)
    order = np.argsort((pixels**2).sum(-1), axis=1, kind="stable")[:, -_BRIGHTEST:]
    colour = np.take_along_axis(pixels, order[..., None], axis=1).mean(axis=1)

    power = (colour**2).sum(-1) + 1e-3  # an empty frame has no colour
    return np.clip(np.einsum("khwc,kc->khw", above, colour) / power[:, None, None], 0, 1)


def _windows(coverage_KxHxW: np.ndarray) -> Iterator[np.ndarray]:
    """Windows f32[K, side, side] around the centroids, moved by every offset of the search."""
    # The centroid of each frame, as the nearest pixel.
    rows, columns = np.arange(spec.HEIGHT), np.arange(spec.WIDTH)
    area = coverage_KxHxW.sum(axis=(1, 2)) + 1e-6
    y = np.rint(coverage_KxHxW.sum(axis=2) @ rows / area).astype(int)
    x = np.rint(coverage_KxHxW.sum(axis=1) @ columns / area).astype(int)

    # A shape at the edge of the frame is seen against empty pixels.
    margin = _HALF + max(_SEARCH)
    padded = np.pad(coverage_KxHxW, ((0, 0), (margin, margin), (margin, margin)))

    # Indices [K, 1, 1], [K, side, 1] and [K, 1, side] cut one window out of each frame.
    frame = np.arange(len(padded))[:, None, None]
    side = np.arange(_SIDE) + margin - _HALF
    for dy in _SEARCH:
        for dx in _SEARCH:
            down = (y + dy)[:, None, None] + side[:, None]
            across = (x + dx)[:, None, None] + side
            yield padded[frame, down, across]


def _silhouettes() -> tuple[np.ndarray, np.ndarray]:
    """Silhouettes of unit energy f32[S, side·side], and the shape of each int [S]."""
    # Each shape at 9 radii and 16 places within a pixel.
    offset = np.arange(_SIDE) - _HALF
    images, shapes = [], []
    for radius in _RADII:
        for dy in _PHASES:
            for dx in _PHASES:
                distances = spec.signed_distances(radius, offset - dx, offset[:, None] - dy)
                for shape, distance in enumerate(distances):
                    images.append(np.clip(0.5 - distance, 0, 1).ravel())
                    shapes.append(shape)

    # Of one energy: else the largest silhouette would always overlap most.
    stacked = np.stack(images).astype(np.float32)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True), np.array(shapes)
