"""Checkpoints of `torch.save` (zip archives), read without torch and without running their code.

The archive holds a pickle that describes the tensors, and one stored member with the raw bytes of
each storage. The pickle may only build dictionaries, lists, numbers, strings and tensors: anything
else in it is refused by name, nothing of it is imported.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from sage_grpo_jax.weights.stored_tensor import File, StoredTensor

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_LARGEST_PICKLE = 1 << 30
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
           "bool")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage, offset, size, stride, *_ignored) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2: (.., requires_grad, hooks, metadata)."""
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data, *_ignored) -> _Tensor:
    """Stands for torch._utils._rebuild_parameter: (data, requires_grad, hooks)."""
    return data


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and tensor descriptions, refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _tensor
        if module == "torch._utils" and name in (
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
        ):
            return _parameter
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return f"torch.{name}"
        if (module, name) == ("torch", "Size"):
            return tuple
        raise ValueError(
            f"holds {module}.{name}: only tensors, dictionaries, lists, numbers and strings are "
            "read; save its state dict alone"
        )

    def persistent_load(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", np.dtype() as dtype, str(key), str(), int(count)):
                return _Storage(dtype, key, count)
        raise ValueError(f"unknown storage {identifier!r}")


def read_file(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint; nested dictionaries give names joined by dots.

    Raises:
      ValueError: not a zip archive of torch.save, damaged, or with more than tensors in it.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError(
                "not a zip archive (torch.save's old format, or cut off): load it in PyTorch and "
                "save it again, as safetensors or with torch.save"
            )
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).tensors()
    except (ValueError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from error


class _Archive:
    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile):
        self._file, self._archive = File(path), archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"has {len(pickles)} members named data.pkl instead of one")
        self._root = pickles[0].removesuffix("data.pkl")
        self._offsets: dict[str, int] = {}

    def tensors(self) -> dict[str, StoredTensor]:
        names = self._archive.namelist()
        order = f"{self._root}byteorder"
        if order in names and self._archive.read(order) != b"little":
            raise ValueError("was written on a big-endian machine")
        if self._archive.getinfo(f"{self._root}data.pkl").file_size > _LARGEST_PICKLE:
            raise ValueError(f"its pickle is larger than {_LARGEST_PICKLE} bytes")
        text = self._archive.read(f"{self._root}data.pkl")
        try:
            content = _Unpickler(io.BytesIO(text)).load()
        except ValueError:
            raise
        except Exception as error:  # damaged pickles raise almost anything
            raise ValueError(f"its pickle is damaged: {error!r}") from error
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__} instead of a dictionary")
        found: dict[str, StoredTensor] = {}
        self._collect(content, "", found)
        return found

    def _collect(self, content: dict, prefix: str, found: dict[str, StoredTensor]) -> None:
        for key, value in content.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                self._collect(value, f"{name}.", found)
            elif isinstance(value, _Tensor):
                if name in found:
                    raise ValueError(f"tensor {name} is there twice")
                found[name] = self._stored(name, value)

    def _stored(self, name: str, tensor: _Tensor) -> StoredTensor:
        storage = tensor.storage
        sizes = (tensor.offset, *tensor.shape, *tensor.strides)
        if len(tensor.shape) != len(tensor.strides) or any(
            type(n) is not int or n < 0 for n in sizes
        ):
            raise ValueError(f"tensor {name}: sizes {tensor.shape}, strides {tensor.strides}")
        last = tensor.offset + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        if 0 not in tensor.shape and last >= storage.count:
            raise ValueError(f"tensor {name} reaches beyond its storage")
        start = self._data_offset(storage)
        expected, contiguous = 1, True
        for size, stride in zip(tensor.shape[::-1], tensor.strides[::-1], strict=True):
            contiguous &= size == 1 or stride == expected
            expected *= size
        return StoredTensor(
            self._file,
            start + tensor.offset * storage.dtype.itemsize,
            storage.dtype,
            tensor.shape,
            None if contiguous else tensor.strides,
        )

    def _data_offset(self, storage: _Storage) -> int:
        """Offset of a storage's bytes in the file: its member, after the local header."""
        if storage.key in self._offsets:
            return self._offsets[storage.key]
        try:
            info = self._archive.getinfo(f"{self._root}data/{storage.key}")
        except KeyError:
            raise ValueError(f"storage {storage.key} is missing") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {storage.key} is compressed")
        if info.file_size < storage.count * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key} has {info.file_size} bytes, too few")
        header = self._file.read(30, info.header_offset)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"storage {storage.key} has no local header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + 30 + name_length + extra_length
        if offset + info.file_size > self._file.size:
            raise ValueError(f"storage {storage.key} is cut off")
        self._offsets[storage.key] = offset
        return offset
