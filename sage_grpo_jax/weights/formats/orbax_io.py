"""Parameter trees as orbax checkpoints: written one layer at a time, read by slices.

Orbax itself takes whole arrays, and holds up to two copies of them while it writes. So orbax writes
a checkpoint of the same tree with one element per array; the arrays (zarr version 3, a folder each)
are then put in their place through tensorstore, and the shapes in orbax's records are set right.
The result is a checkpoint like any other, which orbax restores onto any mesh. A layer of a
parameter is a file, divided into chunks of at most 2 MiB, uncompressed: a process reads little more
than what its devices hold.

Nor is orbax asked to read: of a damaged checkpoint it tells in many lines, from several threads.
Its record of the tree (`_METADATA`) names the arrays, and each array has a record of its own, which
tensorstore reads. Source: `orbax/checkpoint/_src/metadata/tree.py`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax.common import checked_json, files
from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.weights.formats import headers
from sage_grpo_jax.weights.formats.source import (
    FLOATS,
    Index,
    Path,
    Shape,
    Source,
    cast,
    is_stacked,
    pieces,
)

PARAMS = "params"
METADATA = "_METADATA"
TREE = "state"  # orbax's own name for the tree in a checkpoint that holds nothing else
_KEY = re.compile(r"\w+")  # keys are parts of file names
_SMALL = 1 << 20  # values in a chunk that may well be larger than its array
_CHUNK_BYTES = 2 << 20
# tensorstore's errors are these.
_OF_TENSORSTORE = (ValueError, OSError, NotImplementedError, IndexError, OverflowError)


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a folder holds parameters that `write` wrote."""
    return (path / PARAMS / TREE / METADATA).is_file()


# Writing


def write(folder: pathlib.Path, source: Source, dtype: np.dtype, progress: Progress) -> None:
    """Writes FOLDER/params; holds one layer of one parameter in memory.

    Args:
      folder: a temporary folder; what is in it when this raises is of no use.
      source: of the parameters.
      dtype: of the checkpoint.
      progress: is told of the bytes.
    """
    dtype, path = np.dtype(dtype), files.real_path(folder) / PARAMS
    _write_stub(path, source.shapes, dtype)
    layouts = {name: _layout(name, shape, dtype) for name, shape in source.shapes.items()}

    for name, shape in source.shapes.items():
        array = _create(path / TREE / ".".join(name), shape, layouts[name], dtype)
        whole = [(slice(None),) * len(shape)]
        for index in pieces(name, shape) if layouts[name].by_layer else whole:
            values = cast(source.read(name, index), dtype, "/".join(name))
            array[index].write(values).result()
            progress.add(values.nbytes, "/".join(name))

    _correct_records(path / TREE, layouts)


class _Layout(NamedTuple):
    """How an array lies in files: `file_shape` in each, divided into chunks of `chunk_shape`."""

    file_shape: Shape
    chunk_shape: Shape
    by_layer: bool


def _layout(path: Path, shape: Shape, dtype: np.dtype) -> _Layout:
    by_layer = is_stacked(path) and len(shape) > 2
    chunk = file = (1, *shape[1:]) if by_layer else shape
    while math.prod(chunk) * dtype.itemsize > _CHUNK_BYTES:
        axis = int(np.argmax(chunk))
        divisor = next(d for d in range(2, chunk[axis] + 1) if chunk[axis] % d == 0)
        chunk = (*chunk[:axis], chunk[axis] // divisor, *chunk[axis + 1 :])
    return _Layout(file, chunk, by_layer)


def _write_stub(path: pathlib.Path, shapes: Mapping[Path, Shape], dtype: np.dtype) -> None:
    """A checkpoint of the tree with one element in place of each array."""
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False
    context.array_options.saving.use_compression = False
    device = jax.local_devices(backend="cpu")[0]
    stubs = {
        name: jax.device_put(np.zeros((1,) * len(shape), dtype), device)
        for name, shape in shapes.items()
    }
    with context, _quiet_orbax():
        ocp.save(path, traverse_util.unflatten_dict(stubs))


def _create(
    folder: pathlib.Path, shape: Shape, layout: _Layout, dtype: np.dtype
) -> tensorstore.TensorStore:
    """An empty array in place of the one that is there."""
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    codec = {
        "chunk_shape": layout.chunk_shape,
        "codecs": [plain],
        "index_codecs": [plain, {"name": "crc32c"}],
    }

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": layout.file_shape},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": codec}],
        },
        "store_data_equal_to_fill_value": True,
    }

    return tensorstore.open(
        spec, create=True, delete_existing=True, context=_tensor_context()
    ).result()


def _correct_records(folder: pathlib.Path, layouts: Mapping[Path, _Layout]) -> None:
    """Sets the shapes in what orbax recorded about the stubs."""
    tree = json.loads((folder / METADATA).read_text())
    for entry in tree["tree_metadata"].values():
        name = tuple(key["key"] for key in entry["key_metadata"])
        entry["value_metadata"]["write_shape"] = list(layouts[name].file_shape)
    (folder / METADATA).write_text(json.dumps(tree))
    by_name = {".".join(name): layout for name, layout in layouts.items()}
    for file in (folder / "array_metadatas").iterdir():
        records = json.loads(file.read_text())
        for record in records["array_metadatas"]:
            layout = by_name[record["array_metadata"]["param_name"]]
            record["array_metadata"]["write_shape"] = list(layout.file_shape)
            record["array_metadata"]["chunk_shape"] = list(layout.chunk_shape)
        file.write_text(json.dumps(records))


# Reading


def latest_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """The newest complete checkpoint that a `Checkpointer` wrote into a folder.

    Raises:
      ValueError: there is none.
    """
    folder = files.real_path(folder)
    try:
        with _quiet_orbax(), ocp.training.Checkpointer(folder) as checkpointer:
            latest = checkpointer.latest
    except Exception as error:  # of a damaged record: KeyError, TypeError, orbax's own
        raise ValueError(f"{folder}: cannot be read as checkpoints: {error!r}") from error
    if latest is None:
        raise ValueError(f"{folder}: no complete checkpoint")
    return folder / str(latest.step)


class OrbaxSource(Source):
    """Parameters of an orbax checkpoint.

    Where arrays were stored in chunks over several layers (those of a training run are: a chunk is
    what a device held), the parameter that is being read is kept whole, and no other.

    Args:
      path: a checkpoint: a tree, or, with `inside`, one of several checkpointables.
      inside: name of the checkpointable, then keys down to the parameters.
      dtypes: that the parameters may have.

    Raises:
      ValueError: no orbax checkpoint, damaged records, or nothing of these names in it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        inside: tuple[str, ...] = (),
        dtypes: Collection[str] = FLOATS,
    ) -> None:
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
            name: tensorstore.open(spec, open=True, read=True, context=_tensor_context())
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


# Both


@functools.cache
def _tensor_context() -> tensorstore.Context:
    """Few chunks at a time are in memory, on machines with many cores too."""
    return tensorstore.Context(
        {"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}}
    )


class _WithoutClosedLoops:
    """A `sys.unraisablehook` without what reads and writes say that orbax no longer waits for."""

    def __init__(self, hook: Callable[[Any], None]) -> None:
        self._hook = hook

    def __call__(self, raised: Any) -> None:
        text = str(raised.exc_value)
        if not (raised.exc_type is RuntimeError and "Event loop is closed" in text):
            self._hook(raised)


def drop_closed_loops() -> None:
    """From here on nothing is printed for a read or write that ends after orbax has given up.

    It leaves at the first one that fails; each of the others complains, whenever it ends, that the
    event loop it was to report to is closed. The failure itself is an error of orbax's caller.
    """
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops what orbax says beside the result, or the one error, of the block.

    It warns of missing data, since it looks for files of zarr version 2 only, and tells of damage
    in many lines before it raises. It starts many writes and leaves at the first that fails: a
    thread of its own tells of the same error, and each of the other writes complains, whenever it
    ends, that nobody waits for it any more. That may be later: after an error these two stay
    dropped.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def keep(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    def keep_later(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in record.getMessage()

    logger.addFilter(keep)
    logger.addFilter(keep_later)
    drop_closed_loops()
    try:
        yield
        sys.unraisablehook = hook
        logger.removeFilter(keep_later)
    finally:
        logger.removeFilter(keep)
