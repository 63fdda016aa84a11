"""The safetensors format: reading headers, and writing files or shards tensor by tensor.

Format: u64 little-endian length of the header, the header (JSON), then the raw data end to end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.weights.formats import headers
from sage_grpo_jax.weights.formats.headers import SUFFIX
from sage_grpo_jax.weights.formats.stored_tensor import File, StoredTensor

INDEX_SUFFIX = f"{SUFFIX}.index.json"
_WRITTEN = {
    dtype: name for name, dtype in headers.DTYPES.items() if name in ("F32", "F16", "BF16", "F64")
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_file(path: pathlib.Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, and its metadata.

    Raises:
      ValueError: a truncated file, a damaged header, unknown dtypes.
    """
    try:
        return _read_file(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def header_text(path: pathlib.Path) -> bytes:
    """The header of a file, as it is there.

    Raises:
      ValueError: the file has none.
    """
    return _header_text(File(path))


def _header_text(file: File) -> bytes:
    length = int.from_bytes(file.read(8, 0), "little") if file.size >= 8 else None
    if length is None or length > file.size - 8:
        raise ValueError(f"the header is cut off or not one (file of {file.size} bytes)")
    if length > headers.MAX_BYTES:
        raise ValueError(f"the header has {length} bytes: must be at most {headers.MAX_BYTES}")
    return file.read(length, 8)


def _read_file(path: pathlib.Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    file = File(path)
    text = _header_text(file)
    start = 8 + len(text)
    try:
        entries, metadata, count = headers.parse_header(text)
    except ValueError as error:
        raise ValueError(f"the header is damaged: {error}") from error
    if start + count != file.size:
        raise ValueError(f"the file has {file.size} bytes, its header tells of {start + count}")
    tensors = {
        name: StoredTensor(file, start + entry.offset, entry.dtype, entry.shape)
        for name, entry in entries.items()
    }
    return tensors, metadata


def read_files(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a file, or of a folder with one file or with shards and their index.

    Raises:
      ValueError: no or ambiguous files, damaged files, an index that does not fit its files.
    """
    found = _find_file(path)
    if not found.name.endswith(INDEX_SUFFIX):
        return read_file(found)[0]

    # Shards: the index and the files have to say the same.
    tensors, files = {}, {}
    index = _read_index(found)
    for name in sorted(set(index.values())):
        for tensor, stored in read_file(found.parent / name)[0].items():
            if tensor in tensors:
                raise ValueError(f"tensor {tensor} is in two files of {path}")
            tensors[tensor], files[tensor] = stored, name

    wrong = [name for name, file in index.items() if files.get(name) != file]
    if wrong:
        raise ValueError(
            f"{found}: tensors that are not in the files it names: {', '.join(wrong[:20])}"
        )
    return tensors


def _find_file(path: pathlib.Path) -> pathlib.Path:
    """A file of tensors, or the index of several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"path={path}: neither a folder nor a file")
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(indices) == 1:
        return indices[0]
    if indices or len(files) != 1:
        names = [file.name for file in indices or files]
        raise ValueError(
            f"path={path}: must hold one *{SUFFIX} file or one *{INDEX_SUFFIX}, has {names[:20]}"
        )
    return files[0]


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Name of the file of each tensor; all files are there."""
    values = checked_json.load(path, headers.MAX_BYTES)
    try:
        index = headers.parse_index(values)
    except ValueError as error:
        raise ValueError(f"{path}: no index of shards: {error}") from error
    absent = sorted({name for name in index.values() if not (path.parent / name).is_file()})
    if absent:
        raise ValueError(f"{path} names files that are not there: {absent[:20]}")
    return index


def parse_size(text: str) -> int:
    """Bytes of "10GB" (decimal) or "10GiB".

    Raises:
      ValueError: another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"max_shard_size={text!r}: must be a size such as 10GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor goes: an open file, the offset of its data, its shape."""

    descriptor: int
    offset: int
    shape: tuple[int, ...]


class Writer:
    """Writes tensors of known shapes into a folder, in any order and in pieces.

    The files have diffusers' names: STEM.safetensors or, where they would exceed `max_shard_size`,
    STEM-00001-of-0000N.safetensors and an index. Not atomic: write into a temporary folder.

    Args:
      folder: an existing folder.
      stem: of the file names.
      shapes: of all tensors, by name; decides their order.
      dtype: float32, float16, bfloat16 or float64.
      max_shard_size: bytes of data in a file; None: one file. A larger tensor has its own file.
      metadata: goes into the headers.

    Raises:
      ValueError: another dtype.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        stem: str,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: np.dtype,
        max_shard_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._dtype = np.dtype(dtype)
        if self._dtype not in _WRITTEN:
            raise ValueError(f"dtype={dtype}: must be one of {[str(d) for d in _WRITTEN]}")
        self._missing = Counter({name: self._bytes(shape) for name, shape in shapes.items()})

        shards = _split(self._missing, max_shard_size)
        names = [f"{stem}{SUFFIX}"]
        if len(shards) > 1:
            names = [
                f"{stem}-{i:05}-of-{len(shards):05}{SUFFIX}" for i in range(1, len(shards) + 1)
            ]
            _write_index(folder / f"{stem}{INDEX_SUFFIX}", dict(zip(names, shards, strict=True)))

        self._places: dict[str, _Place] = {}
        self._descriptors = []
        for name, shard in zip(names, shards, strict=True):
            given = {tensor: shapes[tensor] for tensor in shard}
            self._start(folder / name, given, {"format": "pt", **(metadata or {})})

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for descriptor in self._descriptors:
            if kind is None:
                os.fsync(descriptor)
            os.close(descriptor)
        left = sorted(name for name, count in self._missing.items() if count)
        if kind is None and left:
            raise ValueError(f"tensors not written, or not exactly once: {left}")

    def write(self, name: str, values: np.ndarray, first_row: int = 0) -> int:
        """Writes a tensor, or the rows of its first axis from `first_row` on; returns the bytes."""
        place = self._places[name]
        data = np.ascontiguousarray(values, self._dtype)
        if data.shape[1:] != place.shape[1:]:
            raise ValueError(f"tensor {name}: {data.shape} does not fit {place.shape}")
        offset = place.offset + first_row * self._bytes(place.shape[1:])
        self._missing[name] -= data.nbytes
        _write_all(place.descriptor, memoryview(data.reshape(-1).view(np.uint8)), offset)
        return data.nbytes

    def _start(
        self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> None:
        header, offset = {"__metadata__": dict(metadata)}, 0
        for name, shape in shapes.items():
            end = offset + self._bytes(shape)
            header[name] = {
                "dtype": _WRITTEN[self._dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        _write_all(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        # The file has its size from the beginning: rows may come in any order.
        os.ftruncate(descriptor, 8 + len(text) + offset)
        for name, shape in shapes.items():
            start = 8 + len(text) + header[name]["data_offsets"][0]
            self._places[name] = _Place(descriptor, start, tuple(shape))

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64)) * self._dtype.itemsize


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """A disk that fills takes a part of a write, and tells only the next one."""
    while len(data):
        count = os.pwrite(descriptor, data[: 1 << 30], offset)
        data, offset = data[count:], offset + count


def _split(sizes: Mapping[str, int], limit: int | None) -> list[dict[str, int]]:
    """Tensors in order, as many in a shard as fit."""
    shards = [{}]
    for name, size in sizes.items():
        if limit is not None and shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size
    return shards


def _write_index(path: pathlib.Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    index = {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards.values())},
        "weight_map": {tensor: file for file, shard in shards.items() for tensor in shard},
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
