"""Parameters of orbax checkpoints, read by slices straight from their arrays.

Orbax itself is not asked: of a damaged checkpoint it tells in many lines, from several threads. Its
record of the tree (`_METADATA`) names the arrays, and each array has a record of its own, which
tensorstore reads. Source: `orbax/checkpoint/_src/metadata/tree.py`.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
import re
from collections.abc import Collection
from typing import Any

import numpy as np
import tensorstore

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.weights import headers
from sage_grpo_jax.weights.key_table import Path
from sage_grpo_jax.weights.sources import FLOATS, Index, Source, is_stacked

METADATA = "_METADATA"
TREE = "state"  # orbax's own name for the tree in a checkpoint that holds nothing else
_KEY = re.compile(r"\w+")  # keys are parts of file names
_SMALL = 1 << 20  # values in a chunk that may well be larger than its array


@functools.cache
def tensor_context() -> tensorstore.Context:
    """Few chunks at a time are in memory, on machines with many cores too."""
    return tensorstore.Context(
        {"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}}
    )


class OrbaxSource(Source):
    """Parameters of an orbax checkpoint.

    Where arrays were stored in chunks over several layers (those of a training run are: a chunk is
    what a device held), the parameter that is being read is kept whole, and no other.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        inside: tuple[str, ...] = (),
        dtypes: Collection[str] = FLOATS,
    ):
        """
        Args:
          path: a checkpoint: a tree, or, with `inside`, one of several checkpointables.
          inside: name of the checkpointable, then keys down to the parameters.
          dtypes: that the parameters may have.

        Raises:
          ValueError: no orbax checkpoint, damaged records, or nothing of these names in it.
        """
        path = pathlib.Path(path).resolve()
        self._folder = path / (inside[0] if inside else TREE)
        record = self._folder / METADATA
        try:
            values = checked_json.load(record, headers.MAX_BYTES)
        except ValueError as error:
            raise ValueError(f"{self._folder}: not from an orbax checkpoint: {error}") from error
        try:
            names = _array_names(values, inside[1:])
            specs = {
                name[len(inside[1:]) :]: _spec(self._folder, ".".join(name), values)
                for name in names
            }
        except ValueError as error:
            raise ValueError(f"{record}: {error}") from error
        if not specs:
            raise ValueError(f"path={path}: the checkpoint has no {'/'.join(inside)}")
        opening = {
            name: tensorstore.open(spec, open=True, read=True, context=tensor_context())
            for name, spec in specs.items()
        }
        self._arrays = {
            name: self._opened(name, future, dtypes) for name, future in opening.items()
        }
        self.shapes = {name: array.shape for name, array in self._arrays.items()}
        self._held: tuple[Path, np.ndarray] | None = None

    def read(self, path: Path, index: Index) -> np.ndarray:
        layers = self._arrays[path].chunk_layout.read_chunk.shape[:1]
        if is_stacked(path) and layers != (1,):
            if self._held is None or self._held[0] != path:
                self._held = None  # never two at a time
                self._held = (path, self._read(path, (slice(None),) * len(self.shapes[path])))
            return self._held[1][index]
        return self._read(path, index)

    def _read(self, path: Path, index: Index) -> np.ndarray:
        try:
            return self._arrays[path][index].read().result()
        except _OF_TENSORSTORE as error:
            raise self._unreadable(path, error) from error

    def _opened(self, path: Path, future: Any, dtypes: Collection[str]) -> tensorstore.TensorStore:
        """An array, once its record is read and makes sense."""
        try:
            array = future.result()
            dtype, chunk = array.dtype, array.chunk_layout.read_chunk.shape
            headers.check_shape(array.shape, "shape")
            if dtype.name not in dtypes:
                raise ValueError(f"dtype={dtype.name}: must be one of {dtypes}")
            most = 2 * math.prod(array.shape) + _SMALL
            if math.prod(chunk) > most:
                raise ValueError(f"chunks of {list(chunk)}: must be at most {most} values")
            return array
        except _OF_TENSORSTORE as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: Path, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:500]
        return ValueError(f"{self._folder}: {'.'.join(path)} cannot be read: {reason}")


# tensorstore's errors are these.
_OF_TENSORSTORE = (ValueError, OSError, NotImplementedError, IndexError, OverflowError)


def _array_names(values: dict[str, Any], below: Path) -> list[Path]:
    """Paths of the arrays in the record of a tree, those below a path.

    Raises:
      ValueError: another form; names that are no names.
    """
    names = []
    for entry in checked_json.member(values, "tree_metadata", dict[str, dict]).values():
        keys = checked_json.member(entry, "key_metadata", list[dict])
        name = tuple(str(checked_json.member(key, "key", str | int)) for key in keys)
        if name[: len(below)] != below:
            continue
        if len(name) == len(below) or not all(_KEY.fullmatch(key) for key in name):
            raise ValueError(f"tree_metadata: {checked_json.shown(name)}: no name of an array")
        kind = checked_json.member(entry, "value_metadata", dict).get("value_type")
        if kind in ("jax.Array", "np.ndarray"):
            names.append(name)
    if len(set(names)) < len(names):
        raise ValueError("tree_metadata: an array is there twice")
    return names


def _spec(folder: pathlib.Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """tensorstore's description of an array."""
    zarr3, ocdbt = (checked_json.member(values, f"use_{x}", bool) for x in ("zarr3", "ocdbt"))
    where: dict[str, Any] = {"driver": "file", "path": f"{folder / name}/"}
    if ocdbt:
        base = {"driver": "file", "path": f"{folder}/"}
        where = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": where,
        "fill_missing_data_reads": False,  # a chunk that is not there is an error, not zeros
    }
