"""Pieces of parameters, casts against torch's, and checks for NaN in arrays of any layout."""

import ml_dtypes
import numpy as np
import pytest
import torch

from sage_grpo_jax.weights.formats import source

STACKED, SINGLE = ("blocks", "query", "kernel"), ("final", "kernel")
DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


@pytest.mark.parametrize(("path", "count"), [(STACKED, 3), (SINGLE, 1)])
def test_pieces_cover_each_value_once(path, count):
    seen = np.zeros((3, 4, 2), int)
    found = source.pieces(path, seen.shape)
    for index in found:
        seen[index] += 1
    assert (seen == 1).all()
    assert len(found) == count


@pytest.mark.parametrize(
    "shape", [(3, 200), (200, 3), (130, 129), (1, 70, 65), (2, 3, 70, 5), (7,)]
)
def test_contiguous_copies_of_transposed_arrays(shape):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for view in (values, values.T, np.swapaxes(values, -1, -min(2, values.ndim)), values[..., ::2]):
        found = source.contiguous(view, np.dtype(np.float64))
        assert found.flags.c_contiguous
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, view)


def test_casts_round_as_torch_does():
    """To nearest, ties to even: halfway between two bfloat16 numbers, and random values."""
    values = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    values[0, :2] = 1 + 2**-8, 1 + 3 * 2**-8
    for view in (values, values.T):
        found = source.cast(view, np.dtype(ml_dtypes.bfloat16), "a")
        want = torch.tensor(np.array(view)).bfloat16().float().numpy()
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found.astype(np.float32), want)


def test_casts_name_the_tensor_that_overflows():
    values = np.array([1.0, 7e4], np.float32)  # the largest float16 is 65504
    assert source.cast(values, np.dtype(np.float64), "a")[1] == 7e4
    with pytest.raises(ValueError, match=r"tensor a\.b: not every value is finite in float16"):
        source.cast(values, np.dtype(np.float16), "a.b")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite_is_found_anywhere(dtype, value, monkeypatch):
    monkeypatch.setattr(source, "_CHECK_BYTES", 64)  # several pieces, the last one not full
    good = np.random.default_rng(0).standard_normal((7, 5, 3)).astype(dtype)
    for place in np.ndindex(good.shape):
        bad = good.copy()
        bad[place] = value
        assert not source.all_finite(bad)
        assert not source.all_finite(bad.transpose(2, 0, 1))
    assert source.all_finite(good)
    assert source.all_finite(good[..., ::2])
    assert not source.all_finite(np.array(value, dtype))


def test_large_values_are_finite():
    """Their sum is not, in their own dtype."""
    for dtype in (np.float16, np.float32):
        assert source.all_finite(np.full(9, np.finfo(dtype).max, dtype))
    assert source.all_finite(np.full(9, 3.3e38, ml_dtypes.bfloat16))
