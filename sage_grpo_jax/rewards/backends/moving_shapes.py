"""VQ, MQ and TA of moving-shapes clips, measured on pixels.

Thirteen errors are measured (`measure`), each 0 for a perfect clip. A reward is a weighted sum of
-log(error + floor) over its errors (`TERMS`): every improvement raises it down to the floor, which
is about the error of a good generator, and no input makes it infinite.

- VQ, blind to the caption: `palette` (root mean square distance of the pixels to the line from a
  background grey to one palette colour, the best pair for the whole clip), `softness` (partly
  covered pixels that no one-pixel ramp explains, per pixel of outline), `presence` (how far the
  covered area of a frame is, in log units, outside of what shapes of the world cover), `outline`
  (1 - correlation with the best silhouette of the world, frame by frame).
- MQ: `velocity` (fitted velocity of the centroid against the captioned one, pixels a frame),
  `jitter` (deviation of the centroid from uniform motion, pixels), `unsteadiness` (relative change
  of area and spread over the frames).
- TA: `colour` (mean colour of the object against the captioned one), `shape` (1 - correlation with
  the captioned silhouette), `identity` (how unlikely it is that every single frame shows the
  captioned shape rather than another one), `direction` (angle between fitted and captioned
  velocity), `size` (log ratio of the areas), `background` (grey against captioned).

Known exploits, all of which the manifold distance sees:

- VQ sees one frame at a time: a clip that shows another shape in every frame is perfect.
- MQ sees only mass, centroid and spread of what differs from the background: a shape that turns or
  morphs is steady motion (TA notices), as are two close shapes moving together. A shape that fades
  in place while its copy ahead appears moves its centroid too. Blur is not seen at all (it even
  helps a little).
- TA sees the mean colour (half red, half blue is nearer to purple than either; only VQ and the mask
  notice), the average correlation (no details) and the fitted displacement (any path).
- `identity` is relative: a caricature that resembles the other silhouettes even less than the
  captioned one does gains a little (and loses in `shape`).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sage_grpo_jax.rewards.backends.base import Backend, Limits, Score
from sage_grpo_jax.worlds.moving_shapes import spec

VERSION = 2  # To be raised with every change of a score that the tables below do not show.


class Term(NamedTuple):
    """One error of a clip in one reward, which it lowers by weight·log(error + floor)."""

    reward: str
    weight: float
    floor: float


TERMS = {
    "palette": Term("VQ", 1.0, 0.01),
    "softness": Term("VQ", 1.0, 0.05),
    "presence": Term("VQ", 2.0, 0.2),
    "outline": Term("VQ", 1.0, 0.01),
    "velocity": Term("MQ", 1.0, 0.03),
    "jitter": Term("MQ", 0.5, 0.05),
    "unsteadiness": Term("MQ", 0.5, 0.02),
    "colour": Term("TA", 1.0, 0.03),
    "shape": Term("TA", 1.0, 0.01),
    "identity": Term("TA", 2.0, 0.05),
    "direction": Term("TA", 1.0, 0.02),
    "size": Term("TA", 0.5, 0.1),
    "background": Term("TA", 0.5, 0.03),
}

# Mean and standard deviation of the raw rewards over 256 samples of the shipped pretrained model
# (training captions, ODE, 10 steps, shift 3); normalised = (raw - mean) / std.
NORMALISATION = {"VQ": (13.03, 0.48), "MQ": (5.46, 0.35), "TA": (16.96, 1.50)}

# Area of a shape of radius 1, in the order of spec.SHAPES.
_UNIT_AREA = np.array(
    [np.pi, (2 * spec.SQUARE_HALF_SIDE) ** 2, 27**0.5 * spec.TRIANGLE_INRADIUS**2]
)
_AREAS = _UNIT_AREA[:, None] * spec.RADIUS**2
_X = (np.arange(spec.WIDTH) + 0.5).astype(np.float32)
_Y = (np.arange(spec.HEIGHT) + 0.5).astype(np.float32)
# Spread (root mean square distance from the centroid) above which a mask is no single shape.
_WIDEST_SPREAD = 5.0
# By so much the share of a frame has to differ from one half for odds of e to 1.
_SHARE_SCALE = 0.1
# Speed, in pixels a frame, under which a direction means little.
_STILL = 0.05


class Track(NamedTuple):
    """What moves in front of the background, found without looking at the caption."""

    ground: np.ndarray  # [3] in 0..1
    colour: np.ndarray  # [3] in 0..1
    mask: np.ndarray  # [F, H, W] in 0..1
    area: np.ndarray  # [F], pixels
    centroid: np.ndarray  # [F, 2], (x, y)
    spread: np.ndarray  # [F], pixels
    velocity: np.ndarray  # [2], pixels a frame, least squares
    jitter: float  # root mean square deviation from uniform motion, pixels


class MovingShapesBackend(Backend):
    """Rewards of the moving-shapes world; numpy only, a few milliseconds a clip."""

    names = ("VQ", "MQ", "TA")
    limits = Limits(max_frames=64, min_side=spec.WIDTH, max_side=spec.WIDTH)

    def fingerprint(self) -> str:
        """SHA-256 over the version and every constant that decides a score."""
        world = {
            name: getattr(spec, name).tolist()
            for name in ("COLOUR_RGB", "BACKGROUND_RGB", "RADIUS", "PIXELS_PER_FRAME", "EXTENT")
        }
        parts = [VERSION, spec.VERSION, spec.FPS, spec.CHOICES, world, TERMS, NORMALISATION]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def score(
        self, video_uint8_FxHxWx3: np.ndarray, prompt: str, fps: float
    ) -> Mapping[str, Score]:
        """Scores one clip. See the base class.

        Raises:
          ValueError: the prompt is no caption of this world, or the video no clip of its size.
        """
        # The log makes an error that is halved worth the same, wherever it stood above the floor.
        errors = measure(video_uint8_FxHxWx3, prompt, fps)
        raw = dict.fromkeys(self.names, 0.0)
        for name, term in TERMS.items():
            raw[term.reward] -= term.weight * float(np.log(errors[name] + term.floor))

        # In standard deviations of what the pretrained model earns.
        scores = {}
        for name in self.names:
            mean, std = NORMALISATION[name]
            scores[name] = Score(raw[name], (raw[name] - mean) / std)
        return scores

    def warm_up(self) -> None:
        video = np.zeros((spec.NUM_FRAMES, spec.HEIGHT, spec.WIDTH, 3), np.uint8)
        self.score(video, spec.example_caption(), spec.FPS)


def measure(video_uint8_FxHxWx3: np.ndarray, prompt: str, fps: float) -> dict[str, float]:
    """The errors of a clip by name (the keys of `TERMS`): finite, 0 is perfect.

    Args:
      video_uint8_FxHxWx3: two frames or more of 32x32 RGB.
      prompt: a caption of the world.
      fps: frames a second; captioned speeds are pixels a second.

    Raises:
      ValueError: the prompt is no caption of this world, or the video no clip of its size.
    """
    # What is seen, and what was asked for.
    _check(video_uint8_FxHxWx3, fps)
    words = spec.Words(*spec.indices(spec.parse_caption(prompt)))
    video = video_uint8_FxHxWx3.astype(np.float32) / 255
    track = find_object(video)
    misfits = _silhouette_misfits(track)

    # VQ and MQ, then what is measured against silhouettes.
    errors = {**_visual_errors(video), **_motion_errors(track, words, fps)}
    errors["outline"] = np.mean(misfits.min(axis=0))
    errors |= _alignment_errors(track, misfits, words)
    return {name: float(value) for name, value in errors.items()}


def _check(video: np.ndarray, fps: float) -> None:
    if video.dtype != np.uint8:
        raise ValueError(f"video has type {video.dtype}, allowed: uint8")
    if video.ndim != 4 or len(video) < 2 or video.shape[1:] != (spec.HEIGHT, spec.WIDTH, 3):
        allowed = f"(F >= 2, {spec.HEIGHT}, {spec.WIDTH}, 3)"
        raise ValueError(f"video has shape {video.shape}, allowed: {allowed}")
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps is {fps}, allowed: a positive number")


# VQ.


def _visual_errors(video: np.ndarray) -> dict[str, float]:
    # The object, as far as the palette explains it: [F, H, W]; its area [F].
    coverage, palette = _explain_by_palette(video.reshape(-1, 3))
    coverage = coverage.reshape(video.shape[:3])
    area = coverage.sum((1, 2))

    # Too small or too large, in log units; one pixel more keeps an empty frame finite.
    low, high = np.log(_AREAS.min() + 1), np.log(_AREAS.max() + 1)
    amount = np.log(area + 1)
    outside = np.maximum(low - amount, 0) + np.maximum(amount - high, 0)

    # Pixels next to both full and empty ones lie on a one-pixel ramp, whatever its phase.
    partial = (4 * coverage * (1 - coverage)) ** 2
    contrast = _extreme_3x3(np.maximum, coverage) - _extreme_3x3(np.minimum, coverage)
    soft = (partial * (1 - contrast)).sum((1, 2))
    # The outline of a square of this area; ten pixels more keep it well above 0.
    outline = 4 * np.sqrt(area + 10)
    return {
        "palette": palette,
        "softness": np.mean(soft / outline),
        "presence": np.mean(outside),
    }


def _explain_by_palette(pixels_Px3: np.ndarray) -> tuple[np.ndarray, float]:
    """The best (background, colour) pair for all pixels: coverage [P], root mean square error."""
    best_error, best = np.inf, np.zeros(len(pixels_Px3), np.float32)
    for ground in spec.BACKGROUND_RGB / 255:
        # With v a pixel minus the ground, c the contrast, p the place of v along c and a = p within
        # 0..1: |v - a c|² = |v|² - a (2 p - a) |c|². So nothing of [P, colour, 3] is made. Float64,
        # as it is the difference of two large sums.
        above = pixels_Px3 - ground
        total = np.einsum("pc,pc->", above, above, dtype=np.float64)
        contrast = spec.COLOUR_RGB / 255 - ground
        power = (contrast**2).sum(1)
        along = (contrast / power[:, None]) @ above.T  # [colour, P]
        coverage = np.clip(along, 0, 1)
        explained = np.einsum("cp,cp->c", coverage, 2 * along - coverage, dtype=np.float64) * power
        errors = total - explained
        if errors.min() < best_error:
            best_error, best = errors.min(), coverage[errors.argmin()]
    return best, float(np.sqrt(max(best_error, 0.0) / pixels_Px3.size))


def _extreme_3x3(extreme: np.ufunc, images_FxHxW: np.ndarray) -> np.ndarray:
    """np.maximum or np.minimum over the 3x3 neighbourhood inside each frame."""
    # Over three rows, then over three columns.
    out = np.pad(images_FxHxW, ((0, 0), (1, 1), (1, 1)), mode="edge")
    out = extreme(extreme(out[:, :-2], out[:, 1:-1]), out[:, 2:])
    return extreme(extreme(out[:, :, :-2], out[:, :, 1:-1]), out[:, :, 2:])


# What moves.


def find_object(video_FxHxWx3: np.ndarray) -> Track:
    """Separates what differs from the background (the median pixel) and follows its centroid.

    Args:
      video_FxHxWx3: float32 in [0, 1].
    """
    # The background, and the colour of what differs most from it: weighted by the fourth power of
    # the distance, soft edges hardly count.
    pixels = video_FxHxWx3.reshape(-1, 3)
    ground = np.median(pixels, axis=0)
    above = pixels - ground
    weight = np.einsum("pc,pc->p", above, above) ** 2
    contrast = weight @ above / (weight.sum() + 1e-3)

    # The offset keeps the faint texture of an empty clip from counting as an object.
    coverage = above @ (contrast / (contrast @ contrast + 0.01))
    coverage = coverage.reshape(video_FxHxWx3.shape[:3])

    # Only what touches a mostly covered pixel counts: faint noise must not add up to an object.
    mask = np.clip(coverage, 0, 1) * _extreme_3x3(np.maximum, _harden(coverage))

    # Uniform motion, by least squares over time counted from the middle of the clip.
    area, centroid, spread = _moments(mask)
    time = np.arange(len(mask)) - (len(mask) - 1) / 2
    velocity = time @ centroid / (time @ time)
    deviation = centroid - centroid.mean(0) - time[:, None] * velocity
    jitter = float(np.sqrt((deviation**2).sum(1).mean()))
    return Track(ground, ground + contrast, mask, area, centroid, spread, velocity, jitter)


def _harden(coverage: np.ndarray) -> np.ndarray:
    """0 for what is hardly covered, 1 for what is mostly covered."""
    return np.clip((coverage - 0.2) / 0.6, 0, 1)


def _moments(mask_FxHxW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area [F], centroid [F, 2], spread [F]; an empty frame sits in the middle, without spread."""
    # Sums over the rows [F, W] and over the columns [F, H] are all that moments need.
    across, down = mask_FxHxW.sum(1, dtype=np.float64), mask_FxHxW.sum(2, dtype=np.float64)
    area = across.sum(1)
    # A tenth of a pixel in the middle of the frame decides only where there is nothing else.
    weight = area + 0.1
    x = (across @ _X + 0.1 * spec.WIDTH / 2) / weight
    y = (down @ _Y + 0.1 * spec.HEIGHT / 2) / weight
    second = (across * (_X - x[:, None]) ** 2).sum(1) + (down * (_Y - y[:, None]) ** 2).sum(1)
    return area, np.stack([x, y], 1), np.sqrt(second / weight)


# MQ.


def _motion_errors(track: Track, words: spec.Words, fps: float) -> dict[str, float]:
    wanted = spec.DIRECTION_XY[words.direction] * _captioned_speed(words, fps)

    # Nothing, or everything, moves steadily: what is not one shape counts as unsteady.
    wide = np.log((track.spread + 1) / (_WIDEST_SPREAD + 1))
    # exp(-area / 6) is 1 for an empty frame and 0.001 for the smallest shape.
    nothing = np.mean(np.exp(-track.area / 6) + np.maximum(wide, 0))

    area = np.std(track.area) / (np.mean(track.area) + 1)
    spread = np.std(np.log(track.spread + 1))
    return {
        "velocity": np.linalg.norm(track.velocity - wanted),
        "jitter": track.jitter + 3 * nothing,
        "unsteadiness": np.hypot(area, spread) + nothing,
    }


def _captioned_speed(words: spec.Words, fps: float) -> float:
    # Captions mean pixels a second: at another frame rate a frame covers another distance.
    return float(spec.PIXELS_PER_FRAME[words.speed]) * spec.FPS / fps


# TA.


def _alignment_errors(track: Track, misfits: np.ndarray, words: spec.Words) -> dict[str, float]:
    direction = spec.DIRECTION_XY[words.direction]
    # What stands still points nowhere: its cosine goes to 0.
    cosine = track.velocity @ direction / np.hypot(np.linalg.norm(track.velocity), _STILL)
    wanted_area = _AREAS[words.shape, words.size]
    return {
        "colour": _distance(track.colour, spec.COLOUR_RGB[words.colour] / 255),
        "shape": np.mean(misfits[words.shape]),
        "identity": _identity_error(misfits, words.shape),
        "direction": (1 - cosine) / 2,
        "size": abs(np.log((track.area.mean() + 1) / (wanted_area + 1))),
        "background": _distance(track.ground, spec.BACKGROUND_RGB[words.background] / 255),
    }


def _distance(colour: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square over the channels."""
    return np.sqrt(np.mean((colour - wanted) ** 2))


def _silhouette_misfits(track: Track) -> np.ndarray:
    """1 - correlation of every frame's mask with the silhouette of each shape: [shape, F].

    The silhouettes have the area of that frame's mask and stand at its centroid.
    """
    # Pixels as seen from the centroid: [F, 1, W] and [F, H, 1].
    x = _X - track.centroid[:, 0, None, None].astype(np.float32)
    y = _Y[:, None] - track.centroid[:, 1, None, None].astype(np.float32)

    energy = np.einsum("fhw,fhw->f", track.mask, track.mask)
    misfits = []
    for shape, unit_area in enumerate(_UNIT_AREA):
        # Of a silhouette with this area; below 4 pixels it would be a dot.
        radius = np.sqrt(np.maximum(track.area, 4) / unit_area).astype(np.float32)
        distances = spec.signed_distances(radius[:, None, None], x, y)[shape]
        silhouette = np.clip(0.5 - distances, 0, 1)

        overlap = np.einsum("fhw,fhw->f", track.mask, silhouette)
        size = np.einsum("fhw,fhw->f", silhouette, silhouette)
        # The offset leaves an empty frame without any resemblance: its misfit is 1.
        misfits.append(1 - overlap / np.sqrt(energy * size + 1e-6))
    return np.stack(misfits)


def _identity_error(misfits: np.ndarray, wanted: int) -> float:
    """How unlikely it is that the frames show the captioned shape rather than another one.

    A frame reads as the captioned shape where its misfit is below those of the others: with the
    share of the captioned one in the sum of it and of the best other, 0 to 1, one half is a frame
    that could be either, and a logistic function of the distance from there is its probability. The
    error is the mean of -log(probability) over the frames: a clip is right when all of them are, so
    each one that is not costs, the first as much as any.
    """
    own, other = misfits[wanted], np.delete(misfits, wanted, axis=0).min(axis=0)
    # The offset keeps a frame that fits both about as well from being decided by the last digits.
    share = (own + 0.003) / (own + other + 0.006)
    return float(np.mean(np.logaddexp(0, (share - 0.5) / _SHARE_SCALE)))
