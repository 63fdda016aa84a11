"""Analysis by synthesis for the moving-shapes world: which clip of the world is a video closest to?

Every discrete choice is tried. A coarse search puts the shape on the pixel grid: frames are shifted
back along each of the eight motions and added up, then correlated with the six silhouettes; this
gives the squared error of all 576 combinations and all start pixels from a few small matrix
products. The best combinations are then refined by Gauss-Newton over the continuous start position
against the exact renderer.

What is left is the distance of a video to the manifold of the world, which no reward sees.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.worlds.moving_shapes import spec
from sage_grpo_jax.worlds.moving_shapes.rendering import ClipParameters, coverage, render

CHUNK = 8  # Clips a call of the jitted program; bounds memory to about 100 MB.
# Combinations that are refined: several may be equally good on the grid of start pixels.
_CANDIDATES = 12
_ITERATIONS = 10
_KERNEL = 17  # Pixels; holds the largest silhouette (14.5 wide) and its ramp.
_PRECISION = jax.lax.Precision.HIGHEST
_VIDEO = (spec.NUM_FRAMES, spec.HEIGHT, spec.WIDTH, 3)
_GRID = (
    len(spec.BACKGROUNDS),
    len(spec.COLOURS),
    len(spec.DIRECTIONS),
    len(spec.SPEEDS),
    len(spec.SHAPES),
    len(spec.SIZES),
)


def fit(videos: np.ndarray | jax.Array) -> tuple[ClipParameters, jax.Array]:
    """The parameters whose clips are closest to the videos, in root mean square.

    Args:
      videos: [N, F, H, W, 3], uint8 or float in [0, 1].

    Returns:
      The parameters, and the residual f32[N]: the root mean square pixel difference between each
      video and its fitted clip, in units where black is 0 and white is 1.

    Raises:
      ValueError: for another shape or type.
    """
    _check(videos)
    count = len(videos)
    parts = []
    for begin in range(0, count, CHUNK):
        # The last chunk is filled with copies, so that one program serves every number of clips.
        rows = np.minimum(np.arange(begin, begin + CHUNK), count - 1)
        parts.append(_fit_chunk(videos[rows]))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *parts)


def manifold_distance(videos_NxFxHxWx3: np.ndarray | jax.Array) -> jax.Array:
    """How far videos are from the moving-shapes world: the residual of `fit`, f32[N].

    Below 0.001 for real clips (the rounding to 8 bits); sigma for a real clip under white noise of
    standard deviation sigma, as long as the noise is not clipped; 0.07 where the shape is missing.
    """
    return fit(videos_NxFxHxWx3)[1]


def _check(videos: np.ndarray | jax.Array) -> None:
    if videos.ndim != 5 or len(videos) == 0 or videos.shape[1:] != _VIDEO:
        raise ValueError(f"videos has shape {videos.shape}, allowed: (N >= 1, *{_VIDEO})")
    if videos.dtype != np.uint8 and not jnp.issubdtype(videos.dtype, jnp.floating):
        raise ValueError(f"videos has type {videos.dtype}, allowed: uint8, or float in [0, 1]")


@jax.jit
def _fit_chunk(videos: jax.Array) -> tuple[ClipParameters, jax.Array]:
    chex.assert_shape(videos, (None, *_VIDEO))
    # [N, F, H, W, 3] in 0..1.
    scale = 255.0 if videos.dtype == jnp.uint8 else 1.0
    videos = videos.astype(jnp.float32) / scale

    # The best combinations on the pixel grid: indices [N, K] into all of them, starts [N, K, 2].
    error, start = _coarse_search(videos)
    _, best = jax.lax.top_k(-error, _CANDIDATES)
    start = jnp.take_along_axis(start, best[..., None], axis=1)
    candidates = _candidates(best, start)

    # The best of them between the pixels, and what it leaves unexplained.
    parameters = jax.vmap(_best_refined)(videos, candidates)
    difference = videos - render(parameters)
    return parameters, jnp.sqrt(jnp.mean(difference**2, axis=(1, 2, 3, 4)))


def _candidates(combination: jax.Array, start: jax.Array) -> ClipParameters:
    """Parameters from indices into the flattened grid of combinations; start is [..., 2]."""
    background, colour, direction, speed, shape, size = jnp.unravel_index(combination, _GRID)
    return ClipParameters(size, colour, shape, direction, speed, background, start)


# Coarse search.


def _coarse_search(videos_NxFxHxWx3: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared error and best start pixel of every combination: f32[N, C], f32[N, C, 2].

    With coverage a, ground g and colour c a clip is g + a (c - g). Its squared error against v is
    |v - g|^2 - 2 a (v - g).(c - g) + a^2 |c - g|^2 summed over pixels, where the sum of a v needs a
    correlation for each motion and silhouette, and colours only combine channels afterwards.
    """
    # What a clip of the world would add to the plain background, for each (ground, colour).
    colour, ground = spec.COLOUR_RGB / 255, spec.BACKGROUND_RGB / 255
    contrast = colour[None] - ground[:, None]  # [ground, colour, 3]

    # The sum of a v, for every start pixel. All that depends on the video is in here.
    silhouettes = _silhouettes()
    stacked = _stack_along_motion(videos_NxFxHxWx3)
    overlap = _correlate(stacked, silhouettes)  # [N, motion, 3, silhouette, H, W]

    # The other sums: of a and a² over all frames, then with the colours of each combination.
    area = spec.NUM_FRAMES * silhouettes.sum((1, 2))
    power = spec.NUM_FRAMES * (silhouettes**2).sum((1, 2))
    cross = jnp.einsum("nmrshw,gcr->ngcmshw", overlap, contrast, precision=_PRECISION)

    offset = np.einsum("gr,gcr->gc", ground, contrast)
    constant = 2 * offset[..., None] * area + (contrast**2).sum(-1)[..., None] * power
    base = jnp.sum((videos_NxFxHxWx3[:, None] - ground[:, None, None, None]) ** 2, (2, 3, 4, 5))

    # Axes [N, ground, colour, motion, silhouette, H, W]: the order of `_GRID`, where a motion is
    # (direction, speed) and a silhouette is (shape, size). Starts off the frame cost infinity.
    error = -2 * cross + constant[None, :, :, None, :, None, None]
    error = error + jnp.where(_allowed_pixels(), 0.0, jnp.inf)
    error = error.reshape(len(videos_NxFxHxWx3), np.prod(_GRID), -1)

    # The best start of each combination, at the centre of its pixel; what |v - g|² adds depends on
    # the ground alone.
    pixel = jnp.argmin(error, axis=-1)
    start = jnp.stack([pixel % spec.WIDTH, pixel // spec.WIDTH], -1) + 0.5
    lowest = jnp.min(error, axis=-1).reshape(len(base), len(spec.BACKGROUNDS), -1)
    return (lowest + base[..., None]).reshape(len(base), -1), start


def _stack_along_motion(videos_NxFxHxWx3: jax.Array) -> jax.Array:
    """Frames moved back to the first one and added up, for every motion: [N, motion, 3, H, W]."""
    # A motion runs along one axis only: left and right shift columns, up and down shift rows.
    along_x = jnp.einsum("nfhxr,dfxw->ndrhw", videos_NxFxHxWx3, _shifts(0), precision=_PRECISION)
    along_y = jnp.einsum("nfywr,dfyh->ndrhw", videos_NxFxHxWx3, _shifts(1), precision=_PRECISION)
    return jnp.concatenate([along_x, along_y], axis=1)


def _shifts(axis: int) -> np.ndarray:
    """Linear interpolation at position + travel, for the motions along one axis.

    Returns:
      f32[motion, F, from, to]; motions in the order of (direction, speed). What comes from outside
      the frame is zero; allowed start positions never look there.
    """
    # How far each motion has come in each frame: [motion, F, 1, 1], pixels.
    step = (spec.DIRECTION_XY[:, None] * spec.PIXELS_PER_FRAME[:, None])[..., axis]
    moving = spec.DIRECTION_XY[:, axis] != 0
    travel = step[moving].reshape(-1, 1, 1, 1) * np.arange(spec.NUM_FRAMES)[:, None, None]

    # A triangle of width 1 around the place that a pixel came from.
    length = (spec.WIDTH, spec.HEIGHT)[axis]
    source, target = np.arange(length)[:, None], np.arange(length)
    return np.maximum(0, 1 - np.abs(source - target - travel)).astype(np.float32)


def _correlate(stacked: jax.Array, silhouettes: np.ndarray) -> jax.Array:
    """Correlates [N, motion, 3, H, W] with [S, k, k] at every pixel: [N, motion, 3, S, H, W].

    By Fourier transforms, several times faster than XLA's convolution on a CPU. The zeros that pad
    a frame keep what wraps around out of it.
    """
    # Rolled so that a silhouette is centred on pixel 0; conjugated, the product is a correlation.
    half = silhouettes.shape[-1] // 2
    padded = (spec.HEIGHT + half, spec.WIDTH + half)
    kernel = np.zeros((len(silhouettes), *padded))
    kernel[:, : 2 * half + 1, : 2 * half + 1] = silhouettes
    kernel = np.conj(np.fft.rfft2(np.roll(kernel, (-half, -half), (1, 2)))).astype(np.complex64)

    product = jnp.fft.rfft2(stacked, padded)[:, :, :, None] * kernel
    return jnp.fft.irfft2(product, padded)[..., : spec.HEIGHT, : spec.WIDTH]


@functools.cache
def _silhouettes() -> np.ndarray:
    """Coverage of each (shape, size) centred on a pixel: f32[S, k, k]."""
    half = _KERNEL // 2
    x = np.arange(-half, half + 1, dtype=np.float32)
    distances = [spec.signed_distances(radius, x, x[:, None]) for radius in spec.RADIUS]
    return np.clip(0.5 - np.stack([d[shape] for shape in range(3) for d in distances]), 0, 1)


def _allowed_pixels() -> np.ndarray:
    """Which pixels can be a start, within half a pixel: bool[motion, silhouette, H, W]."""
    # [shape, size, direction, speed, 2] becomes [motion, silhouette, 1, 1, 2].
    low, high = spec.start_range_table()
    low, high = (
        np.moveaxis(table, (2, 3), (0, 1)).reshape(8, -1, 2)[:, :, None, None]
        for table in (low, high)
    )
    x, y = np.meshgrid(np.arange(spec.WIDTH) + 0.5, np.arange(spec.HEIGHT) + 0.5)
    place = np.stack([x, y], -1)
    return np.all((place >= low - 0.5) & (place <= high + 0.5), axis=-1)


# Refinement.


def _best_refined(video: jax.Array, candidates: ClipParameters) -> ClipParameters:
    """The best of K candidates after refinement; leaves [K] in, scalars out."""
    start, error = jax.vmap(functools.partial(_refine, video))(candidates)
    candidates = candidates._replace(start=start)
    return jax.tree.map(lambda leaf: leaf[jnp.argmin(error)], candidates)


def _refine(video: jax.Array, parameters: ClipParameters) -> tuple[jax.Array, jax.Array]:
    """Projected Gauss-Newton over the start position of one clip; keeps the best point it met.

    Returns:
      (start f32[2], squared error, a scalar).
    """
    low, high = (
        jnp.asarray(table)[
            parameters.shape, parameters.size, parameters.direction, parameters.speed
        ]
        for table in spec.start_range_table()
    )

    # With the coverage a of the pixels, the squared error |v - g - a (c - g)|² sums up to
    # floor + Σ a (power·a - 2·target).
    ground = jnp.asarray(spec.BACKGROUND_RGB / 255)[parameters.background]
    contrast = jnp.asarray(spec.COLOUR_RGB / 255)[parameters.colour] - ground
    power = jnp.sum(contrast**2)
    target = jnp.sum((video - ground) * contrast, axis=-1)  # [F, H, W]
    floor = jnp.sum((video - ground) ** 2)

    def cover(start: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda leaf: leaf[None], parameters._replace(start=start))
        return coverage(one)[0]

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, best, lowest = state
        # The error here, and how the coverage changes along both axes: [F, H, W] each.
        alpha, tangent = jax.linearize(cover, start)
        along_x, along_y = tangent(jnp.array([1.0, 0.0])), tangent(jnp.array([0.0, 1.0]))
        error = floor + jnp.sum(alpha * (power * alpha - 2 * target))
        best = jnp.where(error < lowest, start, best)

        # The normal equations of two unknowns, solved by Cramer's rule. Where nothing changes (no
        # outline in the frame) the floor of the determinant keeps the step finite.
        miss = power * alpha - target
        slope = jnp.stack([jnp.sum(along_x * miss), jnp.sum(along_y * miss)])
        xx, xy, yy = jnp.sum(along_x**2), jnp.sum(along_x * along_y), jnp.sum(along_y**2)
        step = jnp.stack([yy * slope[0] - xy * slope[1], xx * slope[1] - xy * slope[0]])
        step = step / jnp.maximum(power * (xx * yy - xy * xy), 1e-6)

        # At most a pixel, since coverage is far from linear beyond it; never out of the frame.
        start = jnp.clip(start - jnp.clip(step, -1.0, 1.0), low, high)
        return start, best, jnp.minimum(error, lowest)

    # Steps may overshoot: what is returned is the best point that was met.
    start = jnp.clip(parameters.start, low, high)
    state = (start, start, jnp.asarray(jnp.inf, jnp.float32))
    _, best, lowest = jax.lax.fori_loop(0, _ITERATIONS, iterate, state)
    return best, lowest
