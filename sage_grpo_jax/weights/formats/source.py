"""Parameters that are read by slices, whatever holds them; and casts and checks of what is read.

Paths and shapes are those of our parameter tree. A parameter below a key "blocks" is stacked: its
first axis counts layers. Values of a whole model do not fit into memory, so that everything here
works on views, layers or pieces.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping

import numpy as np

Path = tuple[str, ...]
Shape = tuple[int, ...]
Index = tuple[slice, ...]
FLOATS = ("float64", "float32", "float16", "bfloat16")
_CHECK_BYTES = 1 << 24  # checks for NaN go through pieces of this size
_TILE = 64  # elements; two tiles of float32 fit the fastest cache


class Source(abc.ABC):
    """Parameters that can be read by slices.

    Attributes:
      shapes: shape of each parameter, by path.
    """

    shapes: Mapping[Path, Shape]

    @abc.abstractmethod
    def read(self, path: Path, index: Index) -> np.ndarray:
        """A slice (steps of 1) of a parameter, in the dtype that it is stored in."""

    def describe(self, path: Path, layer: int | None) -> str:
        """Name of a parameter, or of one layer of it, for messages."""
        return "/".join(path) + ("" if layer is None else f", layer {layer}")


def is_stacked(path: Path) -> bool:
    """Whether the first axis of a parameter (or adapter) counts layers."""
    return "blocks" in path


def pieces(path: Path, shape: Shape) -> list[Index]:
    """Slices that together are a parameter: one per layer, or the whole."""
    rest = (slice(None),) * (len(shape) - is_stacked(path))
    if not is_stacked(path):
        return [rest]
    return [(slice(i, i + 1), *rest) for i in range(shape[0])]


def contiguous(values: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """`np.ascontiguousarray`, three times as fast where the last two axes are transposed."""
    if values.ndim < 2 or values.strides[-2] >= values.strides[-1]:
        return np.ascontiguousarray(values, dtype)

    out = np.empty(values.shape, values.dtype if dtype is None else dtype)
    rows, columns = (range(0, size, _TILE) for size in values.shape[-2:])
    for outer in np.ndindex(values.shape[:-2]):
        for i in rows:
            for j in columns:
                tile = (*outer, slice(i, i + _TILE), slice(j, j + _TILE))
                out[tile] = values[tile]
    return out


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Contiguous values in a dtype, rounded to nearest, ties to even.

    Raises:
      ValueError: a value is too large for the dtype (or was not finite); the name is told.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        out = contiguous(values, dtype)
    if out.dtype.itemsize < values.dtype.itemsize and not all_finite(out):
        raise ValueError(f"tensor {name}: not every value is finite in {dtype}")
    return out


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; in little memory."""
    # In the order of the memory: the values may be a transposed view.
    values = values.transpose(np.argsort(values.strides)[::-1])
    if values.dtype.itemsize == 2 and values.dtype != np.float16:  # bfloat16: by its bits
        bits = values.view(np.uint16)
        return all(((piece & 0x7F80) != 0x7F80).all() for piece in _pieces(bits))
    for piece in _pieces(values):
        with np.errstate(over="ignore", invalid="ignore"):
            total = piece.sum()  # fast; NaN and infinities survive in it
        if not np.isfinite(total) and not np.isfinite(piece).all():
            return False
    return True


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Views that cover the array, each of limited size where the first axis allows it."""
    if values.ndim == 0:
        yield values
        return
    row_bytes = max(1, values.nbytes // max(1, values.shape[0]))
    step = max(1, _CHECK_BYTES // row_bytes)
    for start in range(0, values.shape[0], step):
        yield values[start : start + step]
