"""Sampling of clips."""

import jax
import numpy as np
import pytest

from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes


def test_sampling_is_deterministic_and_jittable():
    draw = jax.jit(moving_shapes.sample_parameters, static_argnums=(1, 2))
    first = moving_shapes.sample_parameters(jax.random.key(3), 8, "train")
    again = moving_shapes.sample_parameters(jax.random.key(3), 8, "train")
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jitted = draw(jax.random.key(3), 8, "train")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, jitted)
    other = moving_shapes.sample_parameters(jax.random.key(4), 8, "train")
    assert not np.array_equal(first.start, other.start)


def test_splits_hold_what_their_captions_say():
    for split in moving_shapes.spec.SPLITS:
        allowed = moving_shapes.split_captions(split)
        parameters = moving_shapes.sample_parameters(jax.random.key(0), 2000, split)
        seen = set(moving_shapes.captions(parameters))
        assert seen <= set(allowed)
        assert len(seen) > 0.95 * len(allowed)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'tests', allowed: train"):
        moving_shapes.sample_parameters(jax.random.key(0), 1, "tests")


def test_the_whole_shape_stays_in_the_frame():
    parameters = moving_shapes.sample_parameters(jax.random.key(1), 500, "all")
    video = np.asarray(moving_shapes.render(parameters))
    ground = video[:, :1, :1, :1]
    border = np.concatenate(
        [video[:, :, 0], video[:, :, -1], video[:, :, :, 0], video[:, :, :, -1]], 2
    )
    # The half ramp may touch the outermost pixels, the shape itself never leaves.
    assert np.abs(border - ground[:, :, 0]).max() < 0.75
    area = np.abs(video - ground).sum((2, 3, 4))
    assert (area.std(1) / area.mean(1)).max() < 0.03


def test_captions_round_trip_through_parameters():
    texts = moving_shapes.held_out_captions()[::7]
    parameters = moving_shapes.parameters_from_captions(texts, jax.random.key(0))
    assert moving_shapes.captions(parameters) == texts
    one = jax.tree.map(lambda leaf: leaf[3], parameters)
    assert moving_shapes.caption(one) == texts[3]


def test_pixels_are_rounded_and_clipped():
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 1, 2], np.float32)
    np.testing.assert_array_equal(moving_shapes.to_uint8(values), [0, 0, 0, 1, 255, 255])
