"""Analysis by synthesis recovers real clips and measures how far others are away."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes
from sage_grpo_jax.worlds.moving_shapes.fitting import CHUNK, fit, manifold_distance

COUNT = CHUNK


@pytest.fixture(scope="module")
def parameters():
    return moving_shapes.sample_parameters(jax.random.key(11), COUNT, "all")


@pytest.fixture(scope="module")
def clips(parameters):
    return moving_shapes.to_uint8(moving_shapes.render(parameters))


def pixels(videos: np.ndarray) -> np.ndarray:
    return np.round(np.clip(videos, 0, 1) * 255).astype(np.uint8)


def test_real_clips_are_on_the_manifold_and_recovered():
    parameters = moving_shapes.sample_parameters(jax.random.key(5), 3 * CHUNK, "all")
    videos = moving_shapes.to_uint8(moving_shapes.render(parameters))
    fitted, residual = fit(videos)
    assert residual.dtype == np.float32
    assert residual.max() < 0.001
    for name in ("size", "colour", "shape", "direction", "speed", "background"):
        np.testing.assert_array_equal(getattr(fitted, name), getattr(parameters, name))
    np.testing.assert_allclose(fitted.start, parameters.start, atol=0.01)


def test_distance_of_noise_is_its_level(clips):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(clips.shape)
    before = np.asarray(manifold_distance(clips))
    for level in (0.02, 0.3):
        noisy = (clips / 255 + level * noise).astype(np.float32)
        _, residual = fit(noisy)  # not clipped: the level is known
        np.testing.assert_allclose(residual, level, rtol=0.02)
        distance = np.asarray(manifold_distance(pixels(noisy)))
        assert (distance > before).all()
        before = distance


def test_parameters_survive_noise(parameters, clips):
    noise = np.random.default_rng(1).normal(0, 0.1, clips.shape)
    fitted, _ = fit((clips / 255 + noise).astype(np.float32))
    assert moving_shapes.captions(fitted) == moving_shapes.captions(parameters)


@pytest.mark.parametrize(
    ("name", "least"),
    [("static", 0.03), ("shuffled", 0.05), ("teleport", 0.03), ("blurred", 0.015),
     ("two", 0.05), ("diagonal", 0.03), ("no shape", 0.05), ("black", 0.1)],
)  # fmt: skip
def test_wrong_clips_are_far_away(parameters, clips, name, least):
    empty = np.broadcast_to(clips[:, :1, :1, :1], clips.shape)
    late = np.arange(17)[:, None, None, None] >= 9
    wrong = {
        "static": lambda: np.repeat(clips[:, 8:9], 17, 1),
        "shuffled": lambda: clips[:, np.random.default_rng(2).permutation(17)],
        "teleport": lambda: np.where(late, np.roll(clips, (9, 9), (2, 3)), clips),
        "blurred": lambda: pixels(ndimage.gaussian_filter(clips / 255, (0, 0, 1, 1, 0))),
        "two": lambda: np.where(clips == empty, np.roll(clips, (16, 16), (2, 3)), clips),
        "diagonal": lambda: np.stack(
            [np.roll(clips[:, t], (t // 2, t // 2), (1, 2)) for t in range(17)], 1
        ),
        "no shape": lambda: empty,
        "black": lambda: np.zeros_like(clips),
    }[name]()
    distance = np.asarray(manifold_distance(np.ascontiguousarray(wrong)))
    assert np.median(distance) > least
    assert np.isfinite(distance).all()


def test_distance_grows_with_blur(clips):
    before = np.zeros(COUNT)
    for sigma in (0.5, 0.8, 1.2):
        blurred = ndimage.gaussian_filter(clips / 255, (0, 0, sigma, sigma, 0))
        distance = np.asarray(manifold_distance(pixels(blurred)))
        assert (distance > before).all()
        before = distance


def test_number_of_clips_does_not_matter(clips):
    noisy = pixels(clips / 255 + np.random.default_rng(0).normal(0, 0.1, clips.shape))
    whole = np.asarray(manifold_distance(noisy))
    np.testing.assert_array_equal(manifold_distance(noisy[:3]), whole[:3])
    more = manifold_distance(np.concatenate([noisy, noisy[:1]]))
    np.testing.assert_array_equal(more, [*whole, whole[0]])


def test_random_pixels_are_finite_and_bounded():
    noise = np.random.default_rng(0).integers(0, 256, (2, 17, 32, 32, 3), dtype=np.uint8)
    assert (np.asarray(manifold_distance(noise)) > 0.3).all()


@pytest.mark.parametrize("shape", [(17, 32, 32, 3), (1, 16, 32, 32, 3), (0, 17, 32, 32, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="videos has shape"):
        manifold_distance(np.zeros(shape, np.uint8))


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="videos has type int32"):
        fit(np.zeros((1, 17, 32, 32, 3), np.int32))
