"""Checkpoints of `torch.save` (zip archives), read without torch and without running their code.

The archive holds a pickle that describes the tensors (`torch_pickle`), and one stored member with
the raw bytes of each storage.
"""

from __future__ import annotations

import pathlib
import struct
import zipfile
import zlib

from sage_grpo_jax.weights.formats import headers, torch_pickle
from sage_grpo_jax.weights.formats.stored_tensor import File, StoredTensor
from sage_grpo_jax.weights.formats.torch_pickle import Storage, Tensor

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_MAX_DEPTH, _MAX_VALUES = 16, 1 << 20
_ENCRYPTED = 0x1
# What `zipfile` raises for damaged directories, besides ValueError.
_OF_ZIPFILE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error, OverflowError)


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
    except (ValueError, OSError, EOFError, *_OF_ZIPFILE) as error:
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from error


class _Archive:
    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = File(path), archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"has {len(pickles)} members named data.pkl instead of one")
        self._root = pickles[0].removesuffix("data.pkl")
        self._members: dict[str, tuple[int, int]] = {}
        self._left = _MAX_VALUES

    def tensors(self) -> dict[str, StoredTensor]:
        names = self._archive.namelist()
        order = f"{self._root}byteorder"
        if order in names and self._read(order) != b"little":
            raise ValueError("was written on a big-endian machine")
        content = torch_pickle.load(self._read(f"{self._root}data.pkl"))
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__} instead of a dictionary")
        found: dict[str, StoredTensor] = {}
        self._collect(content, "", found, depth=0)
        return found

    def _read(self, name: str) -> bytes:
        """A small member."""
        offset, size, checksum = self._find(name)
        if size > torch_pickle.MAX_BYTES:
            raise ValueError(
                f"{self._short(name)} has {size} bytes: must be at most {torch_pickle.MAX_BYTES}; "
                "save its state dict alone"
            )
        content = self._file.read(size, offset)
        if zlib.crc32(content) != checksum:
            raise ValueError(f"{self._short(name)} is damaged: its checksum is another")
        return content

    def _find(self, name: str) -> tuple[int, int, int]:
        """(offset, bytes, checksum) of a member that lies in the file as it is."""
        info, short = self._archive.getinfo(name), self._short(name)
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"{short} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{short} is compressed (method {info.compress_type})")
        # The archive's directory does not say where the bytes of a member are: the header before
        # them has names and fields of its own lengths.
        header = self._file.read(30, info.header_offset)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"{short} has no local header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + 30 + name_length + extra_length
        if offset + info.file_size > self._file.size:
            raise ValueError(f"{short} is cut off")
        return offset, info.file_size, info.CRC

    def _short(self, name: str) -> str:
        return name.removeprefix(self._root)

    def _collect(
        self, content: dict, prefix: str, found: dict[str, StoredTensor], depth: int
    ) -> None:
        """The tensors of a dictionary that may hold others, or itself, any number of times."""
        self._left -= len(content)
        if depth > _MAX_DEPTH or self._left < 0:
            raise ValueError(
                f"its dictionaries are nested more than {_MAX_DEPTH} deep, or hold more than "
                f"{_MAX_VALUES} values"
            )

        for key, value in content.items():
            if not isinstance(value, dict | Tensor):
                continue
            name = headers.check_name(f"{prefix}{key}")
            if isinstance(value, dict):
                self._collect(value, f"{name}.", found, depth + 1)
            elif name in found:
                raise ValueError(f"tensor {name} is there twice")
            else:
                found[name] = self._stored(name, value)

    def _stored(self, name: str, tensor: Tensor) -> StoredTensor:
        storage = tensor.storage
        last = tensor.offset + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        if 0 not in tensor.shape and last >= storage.count:
            raise ValueError(f"tensor {name} reaches beyond its storage")

        start = self._data_offset(storage)
        # Strides of axes of size 1 say nothing.
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

    def _data_offset(self, storage: Storage) -> int:
        """Offset of a storage's bytes in the file."""
        if storage.key not in self._members:
            try:
                self._members[storage.key] = self._find(f"{self._root}data/{storage.key}")[:2]
            except KeyError:
                raise ValueError(f"storage {storage.key} is missing") from None
        offset, have = self._members[storage.key]
        if have < storage.count * storage.dtype.itemsize:
            raise ValueError(
                f"storage {storage.key} has {have} bytes, too few for {storage.count} of "
                f"{storage.dtype}"
            )
        return offset
