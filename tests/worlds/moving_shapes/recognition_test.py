"""Which shape a frame shows: known clips, clips that change it, and clips that show none."""

import jax
import numpy as np
import pytest

from sage_grpo_jax.worlds.moving_shapes import recognition as shape_recognition
from sage_grpo_jax.worlds.moving_shapes import spec
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes


@pytest.fixture(scope="module")
def clips() -> tuple[np.ndarray, list[str]]:
    """Real clips of every shape, size, colour and background, at places between the pixels."""
    captions = spec.split_captions("all")[::4]
    parameters = moving_shapes.parameters_from_captions(captions, jax.random.key(8))
    return moving_shapes.to_uint8(moving_shapes.render(parameters)), captions


def _shapes(captions: list[str]) -> np.ndarray:
    return np.array([spec.SHAPES.index(spec.parse_caption(text).shape) for text in captions])


def test_every_frame_of_real_clips_is_recognised(clips):
    videos, captions = clips
    assert len(set(_shapes(captions))) == 3
    expected = np.repeat(_shapes(captions)[:, None], spec.NUM_FRAMES, axis=1)
    np.testing.assert_array_equal(shape_recognition.recognise(videos), expected)
    assert shape_recognition.identity(videos, captions) == (1.0, 1.0, 1.0)


def test_blur_and_noise_of_a_good_generator_change_little(clips):
    videos, captions = clips
    blurred = sum(np.roll(videos.astype(np.float32), d, axis=3) for d in (-1, 0, 0, 1)) / 4
    noise = np.random.default_rng(0).normal(0, 5, videos.shape)
    worse = np.clip(blurred + noise, 0, 255).astype(np.uint8)
    assert shape_recognition.identity(worse, captions).frames > 0.95


def test_a_shape_that_turns_into_another_one_is_noticed(clips):
    videos, captions = clips
    wanted = _shapes(captions)
    order = np.argsort(wanted, kind="stable")
    videos, wanted = videos[order], wanted[order]
    captions = [captions[row] for row in order]
    other = np.roll(np.arange(len(videos)), len(videos) // 3)  # a clip of another shape
    assert (wanted[other] != wanted).all()
    mixed = videos.copy()
    mixed[:, 0] = videos[other, 0]
    found = shape_recognition.identity(mixed, captions)
    assert found.first_frame == found.clips == 0.0
    assert found.frames == pytest.approx(1 - 1 / spec.NUM_FRAMES)
    mixed = videos.copy()
    mixed[::2, 5:9] = videos[other][::2, 5:9]
    found = shape_recognition.identity(mixed, captions)
    assert found.first_frame == 1.0
    assert found.clips == pytest.approx(0.5, abs=0.02)


def test_the_caption_decides_what_is_right(clips):
    videos, captions = clips
    swap = {"disk": "square", "square": "triangle", "triangle": "disk"}
    wrong = []
    for text in captions:
        shape = spec.parse_caption(text).shape
        wrong.append(text.replace(shape, swap[shape]))
    assert shape_recognition.identity(videos, wrong) == (0.0, 0.0, 0.0)


def test_empty_clips_have_no_nan():
    empty = np.full((2, 3, spec.HEIGHT, spec.WIDTH, 3), 38, np.uint8)
    assert shape_recognition.recognise(empty).shape == (2, 3)


@pytest.mark.parametrize(
    "videos",
    [
        np.zeros((1, 2, 32, 32, 3), np.float32),
        np.zeros((1, 2, 16, 32, 3), np.uint8),
        np.zeros((2, 32, 32, 3), np.uint8),
    ],
)
def test_other_pixels_are_refused(videos):
    with pytest.raises(
        ValueError, match=r"videos: got .*; allowed: uint8 \[N, F, \*\(32, 32, 3\)\]"
    ):
        shape_recognition.recognise(videos)
