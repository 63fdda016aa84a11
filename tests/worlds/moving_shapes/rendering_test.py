"""The renderer against geometry by brute force."""

import numpy as np
import pytest

from sage_grpo_jax.worlds.moving_shapes import spec
from sage_grpo_jax.worlds.moving_shapes.rendering import ClipParameters, coverage, render


def clip(**changes) -> ClipParameters:
    fields = {"size": 1, "colour": 0, "shape": 0, "direction": 1, "speed": 1, "background": 0}
    fields |= changes
    start = np.array([fields.pop("start", (9.3, 15.8))], np.float32)
    return ClipParameters(**{k: np.array([v], np.int32) for k, v in fields.items()}, start=start)


def inside(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points in a shape, by its corners."""
    if shape == "disk":
        return np.hypot(x, y) <= radius
    if shape == "square":
        return (abs(x) <= 0.9 * radius) & (abs(y) <= 0.9 * radius)
    angles = np.deg2rad([270, 30, 150])  # the first corner points up
    corners = 1.4 * radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    out = np.ones_like(x, bool)
    for a, b in zip(corners, np.roll(corners, -1, 0), strict=True):
        out &= (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) >= 0
    return out


@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize("size", range(2))
def test_coverage_is_the_covered_part_of_a_pixel(shape, size):
    parameters = clip(shape=shape, size=size)
    got = np.asarray(coverage(parameters))[0]
    fine = (np.arange(32 * 8) + 0.5) / 8
    for frame in (0, 5, 16):
        x, y = np.meshgrid(fine - 9.3 - 0.9 * frame, fine - 15.8)
        points = inside(spec.SHAPES[shape], float(spec.RADIUS[size]), x, y)
        want = points.reshape(32, 8, 32, 8).mean((1, 3))
        assert np.abs(got[frame] - want).max() < 0.35  # corners
        assert np.abs(got[frame] - want).mean() < 0.003
        assert abs(got[frame].sum() / want.sum() - 1) < 0.05


@pytest.mark.parametrize("direction", range(4))
@pytest.mark.parametrize("speed", range(2))
def test_the_centroid_moves_as_captioned(direction, speed):
    mask = np.asarray(coverage(clip(direction=direction, speed=speed, start=(16, 16))))[0]
    grid = np.arange(32) + 0.5
    area = mask.sum((1, 2))
    centroid = np.stack([mask.sum(1) @ grid, mask.sum(2) @ grid], 1) / area[:, None]
    step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    want = np.array(step[spec.DIRECTIONS[direction]]) * (0.4, 0.9)[speed]
    # The first ten frames: later a fast shape from the middle would touch the frame's edge.
    np.testing.assert_allclose(np.diff(centroid[:10], axis=0).mean(0), want, atol=0.01)


def test_colours_are_exact_inside_and_outside():
    video = np.asarray(render(clip(colour=4, background=1)))[0]
    assert video.shape == (17, 32, 32, 3)
    np.testing.assert_allclose(video[0, 15, 9] * 255, spec.COLOUR_RGB[4], atol=1e-4)
    np.testing.assert_allclose(video[0, 0, 0] * 255, spec.BACKGROUND_RGB[1], atol=1e-4)
    assert video.min() >= 0
    assert video.max() <= 1


def test_render_checks_its_input():
    parameters = clip()
    with pytest.raises(AssertionError):
        render(parameters._replace(start=parameters.start[0]))
    with pytest.raises(AssertionError):
        render(parameters._replace(size=np.zeros(2, np.int32)))
