"""Sources of parameters: another codebase's tensors, trees in memory, and sources around others.

A source (`formats.source`) knows the shape of each parameter and reads any slice of it. The other
modules are written against that: a conversion is a source and a sink, merging adapters is a source
around two others, and loading is a source whose slices go to devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sage_grpo_jax.weights.formats.source import (
    FLOATS,
    Index,
    Path,
    Shape,
    Source,
    all_finite,
    contiguous,
    is_stacked,
)
from sage_grpo_jax.weights.formats.stored_tensor import StoredTensor
from sage_grpo_jax.weights.tables.key_table import Row, check_tensors


class TensorSource(Source):
    """The tensors of a checkpoint in another layout.

    Args:
      rows: key table of the layout.
      shapes: of our parameters.
      tensors: of the checkpoint.

    Raises:
      ValueError: tensors missing, unexpected, misshapen, or not of a float type.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        shapes: Mapping[Path, Shape],
        tensors: Mapping[str, StoredTensor],
    ) -> None:
        check_tensors(rows, shapes, {name: tensor.shape for name, tensor in tensors.items()})
        wrong = [f"{n} is {t.dtype}" for n, t in tensors.items() if str(t.dtype) not in FLOATS]
        if wrong:
            raise ValueError(f"dtypes must be one of {FLOATS}: {', '.join(wrong[:50])}")
        self.shapes = dict(shapes)
        self._rows = {row.ours: row for row in rows}
        self._tensors = tensors

    def read(self, path: Path, index: Index) -> np.ndarray:
        row, shape = self._rows[path], self.shapes[path]
        bounds, names = _bounds(index, shape), row.names()
        # Each layer is a tensor of its own there: our first axis chooses among them.
        if row.stacked is not None:
            names, bounds = names[slice(*bounds[0])], bounds[1:]
        here = tuple(slice(*bound) for bound in bounds)
        there = row.index_there(here, row.layer_shape(shape))
        layers = [self._read_layer(row, name, there, here) for name in names]
        if row.stacked is None:
            return layers[0]
        return layers[0][None] if len(layers) == 1 else np.stack(layers)

    def describe(self, path: Path, layer: int | None) -> str:
        return self._rows[path].names()[layer or 0]

    def _read_layer(self, row: Row, name: str, there: Index, here: Index) -> np.ndarray:
        return row.to_ours(self._tensors[name].read(there), here)


class TreeSource(Source):
    """Parameters in memory; reads one whole parameter from the devices at a time."""

    def __init__(self, params: Any) -> None:
        self._flat = traverse_util.flatten_dict(params)
        self.shapes = {path: tuple(value.shape) for path, value in self._flat.items()}
        self._held: tuple[Path, np.ndarray] | None = None

    def read(self, path: Path, index: Index) -> np.ndarray:
        if self._held is None or self._held[0] != path:
            self._held = None  # never two at a time
            self._held = (path, np.asarray(jax.device_get(self._flat[path])))
        return self._held[1][index]


class MergedSource(Source):
    """Base weights with adapters added: W + scale A B in float32, slice by slice.

    Args:
      base: the parameters of the model.
      adapters: the adapters (models/lora.py).
      scale: alpha / rank.

    Raises:
      ValueError: adapters of layers that the base lacks, or of other widths.
    """

    def __init__(self, base: Source, adapters: Source, scale: float) -> None:
        self.shapes, self._base, self._adapters, self._scale = base.shapes, base, adapters, scale

        for path, shape in adapters.shapes.items():
            kernel = self.shapes.get((*path[:-1], "kernel"), ())
            # down [..., in, r], up [..., r, out]
            fits = (
                kernel[:-1] == shape[:-1]
                if path[-1] == "down"
                else (kernel[:-2] == shape[:-2] and kernel[-1:] == shape[-1:])
            )
            if not fits:
                raise ValueError(
                    f"adapter {'/'.join(path)}: {shape} does not fit the base weights {kernel}"
                )

    def read(self, path: Path, index: Index) -> np.ndarray:
        value, down = self._base.read(path, index), (*path[:-1], "down")
        if path[-1] != "kernel" or down not in self._adapters.shapes:
            return value

        whole = slice(None)
        down = self._adapters.read(down, (*index[:-1], whole)).astype(np.float32)
        up = self._adapters.read((*path[:-1], "up"), (*index[:-2], whole, index[-1]))
        with np.errstate(over="ignore", invalid="ignore"):  # who reads it looks for infinities
            product = np.matmul(down, up.astype(np.float32))
            product *= np.float32(self._scale)
            product += value  # float32, whatever the base is stored in
        return product

    def describe(self, path: Path, layer: int | None) -> str:
        return self._base.describe(path, layer)


class FiniteSource(Source):
    """Refuses values that are not finite, naming the file and the tensor.

    Args:
      source: to be read.
      where: it lies, for messages.
    """

    def __init__(self, source: Source, where: str | os.PathLike) -> None:
        self.shapes, self._source, self._where = source.shapes, source, where

    def read(self, path: Path, index: Index) -> np.ndarray:
        value = self._source.read(path, index)
        if not all_finite(value):
            layer = (index[0].start or 0) if is_stacked(path) else None
            raise ValueError(
                f"{self._where}: tensor {self._source.describe(path, layer)} holds NaN or infinite "
                "values"
            )
        return value

    def describe(self, path: Path, layer: int | None) -> str:
        return self._source.describe(path, layer)


def to_devices(source: Source, shardings: Any, dtype: np.dtype) -> dict[str, Any]:
    """Parameters on devices; each process reads only the slices that its devices hold.

    Args:
      source: of the parameters.
      shardings: tree of shardings like the parameters, or None for the default device.
      dtype: of the parameters.
    """
    where = {} if shardings is None else traverse_util.flatten_dict(shardings)
    params = {}
    for path, shape in source.shapes.items():
        read = _cached_reader(source, path, shape, np.dtype(dtype))
        if shardings is None:
            params[path] = jnp.asarray(read((slice(None),) * len(shape)))
        else:
            params[path] = jax.make_array_from_callback(shape, where[path], read)
    return traverse_util.unflatten_dict(params)


def _cached_reader(
    source: Source, path: Path, shape: Shape, dtype: np.dtype
) -> Callable[[Index], np.ndarray]:
    """A function from a slice to its values; devices that hold the same slice share one read."""
    cache = {}

    def read(index: Index) -> np.ndarray:
        bounds = _bounds(index, shape)
        if bounds not in cache:
            out = np.empty([stop - start for start, stop in bounds], dtype)
            _fill(out, source, path, tuple(slice(*bound) for bound in bounds))
            cache[bounds] = out
        return cache[bounds]

    return read


def _fill(out: np.ndarray, source: Source, path: Path, index: Index) -> None:
    """Reads a slice into an array, one layer at a time where layers are stacked."""
    if not is_stacked(path):
        out[...] = contiguous(source.read(path, index), out.dtype)
        return
    start = index[0].indices(source.shapes[path][0])[0]
    for i in range(out.shape[0]):
        layer = source.read(path, (slice(start + i, start + i + 1), *index[1:]))[0]
        out[i] = contiguous(layer, out.dtype)


def _bounds(index: Index, shape: Shape) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
