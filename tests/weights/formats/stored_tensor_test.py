"""Tensors in files, read by slices: the same values as numpy finds, and files that end early."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from sage_grpo_jax.weights.formats.stored_tensor import File, StoredTensor

BEFORE = 24  # bytes that are not the tensor's


def written(path, values):
    path.write_bytes(b"\1" * BEFORE + values.tobytes() + b"\2" * 5)
    return File(path)


def slices(size):
    """Of an axis: all, none, some, and the last."""
    return [slice(None), slice(1, 1), slice(1, size - 1), slice(size - 1, size)]


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_, ml_dtypes.bfloat16])
def test_any_slice_of_a_contiguous_tensor(dtype, tmp_path):
    values = np.random.default_rng(0).integers(0, 2, (4, 3, 5)).astype(dtype)
    tensor = StoredTensor(written(tmp_path / "a", values), BEFORE, values.dtype, values.shape)
    np.testing.assert_array_equal(tensor.read(), values)
    for index in itertools.product(*map(slices, values.shape)):
        found = tensor.read(index)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values[index])


def test_any_slice_of_a_tensor_with_strides(tmp_path):
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    view = values[1:].transpose(2, 0, 1)[1:4]
    strides = tuple(stride // 4 for stride in view.strides)
    offset = BEFORE + 4 * (20 + 1)  # values[1, 0, 1] is the first
    tensor = StoredTensor(written(tmp_path / "a", values), offset, view.dtype, view.shape, strides)
    np.testing.assert_array_equal(tensor.read(), view)
    for index in itertools.product(*map(slices, view.shape)):
        np.testing.assert_array_equal(tensor.read(index), view[index])


def test_numbers_and_empty_tensors(tmp_path):
    file = written(tmp_path / "a", np.array(2.5, np.float64))
    assert StoredTensor(file, BEFORE, np.dtype(np.float64), ()).read() == 2.5
    empty = StoredTensor(file, BEFORE, np.dtype(np.float64), (3, 0))
    assert empty.read((slice(1, 3), slice(None))).shape == (2, 0)


def test_files_that_end_early_are_named(tmp_path):
    file = written(tmp_path / "short", np.zeros(3, np.float32))
    tensor = StoredTensor(file, BEFORE, np.dtype(np.float32), (9,))
    with pytest.raises(ValueError, match=r"short: ends at byte 41, 19 are missing"):
        tensor.read()
    with pytest.raises(ValueError, match=r"short: ends at byte 41, 1 are missing"):
        file.read(2, 40)
