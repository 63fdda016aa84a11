"""Tensors that lie in files: read whole or by slices, never more than asked for."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np


class File:
    """An open file that is read at offsets."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """Fills a contiguous array with the bytes at `offset`.

        Raises:
          ValueError: the file ends before.
        """
        # A view as bytes: memoryview does not know bfloat16.
        left = memoryview(out.reshape(-1).view(np.uint8))
        while len(left):
            count = os.preadv(self._descriptor, [left[: 1 << 30]], offset)
            if count == 0:
                raise ValueError(f"{self.path}: ends at byte {offset}, {len(left)} are missing")
            left, offset = left[count:], offset + count

    def read(self, count: int, offset: int) -> bytes:
        """`count` bytes at `offset`.

        Raises:
          ValueError: the file ends before.
        """
        out = np.empty(count, np.uint8)
        self.read_into(out, offset)
        return out.tobytes()


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
      file: the file.
      offset: of the first element, in bytes.
      dtype: of the elements, little-endian.
      shape: of the tensor.
      strides: in elements; None for a tensor that lies there contiguously.
    """

    file: File
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a slice of it (steps of 1), in the dtype of the file."""
        bounds = [(0, size) for size in self.shape]
        if index is not None:
            bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        shape = tuple(stop - start for start, stop in bounds)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        # Whole rows of the first axis lie together: one read.
        if self.strides is None and shape[1:] == self.shape[1:]:
            out = np.empty(shape, self.dtype)
            row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
            skipped = bounds[0][0] * row_bytes if bounds else 0
            self.file.read_into(out, self.offset + skipped)
            return out
        return self._read_strided(bounds)

    def _read_strided(self, bounds: list[tuple[int, int]]) -> np.ndarray:
        """Through a memory map, which lives until the slice is copied: only its pages are read."""
        strides = self.strides or _contiguous_strides(self.shape)
        first = sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
        last = sum((stop - 1) * stride for (_, stop), stride in zip(bounds, strides, strict=True))
        mapped = np.memmap(
            self.file.path,
            np.uint8,
            "r",
            self.offset + first * self.dtype.itemsize,
            (last - first + 1) * self.dtype.itemsize,
        )
        view = np.lib.stride_tricks.as_strided(
            mapped.view(self.dtype),
            [stop - start for start, stop in bounds],
            [stride * self.dtype.itemsize for stride in strides],
            writeable=False,
        )
        return np.array(view)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
