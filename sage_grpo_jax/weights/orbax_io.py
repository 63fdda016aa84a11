"""Parameter trees as orbax checkpoints, written one layer at a time; `orbax_reading` reads them.

Orbax itself takes whole arrays, and holds up to two copies of them while it writes. So orbax writes
a checkpoint of the same tree with one element per array; the arrays (zarr version 3, a folder each)
are then put in their place through tensorstore, and the shapes in orbax's records are set right.
The result is a checkpoint like any other, which orbax restores onto any mesh.

A layer of a parameter is a file, divided into chunks of at most 2 MiB, uncompressed: a process
reads little more than what its devices hold.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax.common import files
from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.weights.key_table import Path, Shape
from sage_grpo_jax.weights.orbax_reading import METADATA, TREE, tensor_context
from sage_grpo_jax.weights.sources import Source, cast, is_stacked, pieces

PARAMS = "params"
_CHUNK_BYTES = 2 << 20


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a folder holds parameters that `write` wrote."""
    return (path / PARAMS / TREE / METADATA).is_file()


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
        spec, create=True, delete_existing=True, context=tensor_context()
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


class _WithoutClosedLoops:
    """A `sys.unraisablehook` without what reads and writes say that orbax no longer waits for."""

    def __init__(self, hook: Callable[[Any], None]):
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
