"""Reading and writing safetensors, one tensor at a time.

Reading is memory-mapped and by slices: a host touches only the parts that it holds. Writing
streams: no more than one parameter is in host memory beside the device arrays.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np
import safetensors

_DTYPE_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
_INDEX_SUFFIX = ".safetensors.index.json"


class Reader:
    """The tensors of a checkpoint: a single file, or a folder with one file or shards and an index.

    Attributes:
      shapes: shape of every tensor, by name, from the file headers.

    Raises:
      ValueError: no or ambiguous files, a damaged file, an index that does not fit its files.
    """

    def __init__(self, path: str | os.PathLike):
        self._where = {}
        for handle in map(_open, _find_files(pathlib.Path(path))):
            for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                if name in self._where:
                    raise ValueError(f"tensor {name} is in two files of {path}")
                self._where[name] = handle
        self.shapes = {
            name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._where.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in the dtype of the file."""
        return self._where[name].get_slice(name)[index]


def write(path: pathlib.Path, shapes: Mapping[str, tuple], dtype: np.dtype, tensors: Iterable):
    """Writes one file; `tensors` yields (name, array) in the order of `shapes`.

    Not atomic: write under a temporary name and rename.
    """
    dtype = np.dtype(dtype)
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype={dtype}: must be one of {[str(d) for d in _DTYPE_NAMES]}")
    with open(path, "wb") as file:
        _write_header(file, shapes, dtype)
        expected = iter(shapes.items())
        for name, array in tensors:
            if (name, tuple(array.shape)) != next(expected, None):
                raise ValueError(f"tensor {name} {array.shape} is not the next one of the header")
            file.write(np.ascontiguousarray(array, dtype).tobytes())
        if (left := next(expected, None)) is not None:
            raise ValueError(f"tensor {left[0]} of the header was not given")
        file.flush()
        os.fsync(file.fileno())


def _write_header(file: BinaryIO, shapes: Mapping[str, tuple], dtype: np.dtype) -> None:
    # Format: u64 little-endian header length, JSON header, then the raw data end to end.
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    file.write(len(text).to_bytes(8, "little") + text)


def _open(file: pathlib.Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"path={path}: neither a folder nor a file")
    indices = sorted(path.glob(f"*{_INDEX_SUFFIX}"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return _files_of_index(indices[0])
    if indices or len(files) != 1:
        names = [file.name for file in indices or files]
        raise ValueError(
            f"path={path}: must hold one *.safetensors file or one *{_INDEX_SUFFIX}, has {names}"
        )
    return files


def _files_of_index(index: pathlib.Path) -> list[pathlib.Path]:
    weight_map = json.loads(index.read_text())["weight_map"]
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{index} names files that are not there: {absent}")
    return files
