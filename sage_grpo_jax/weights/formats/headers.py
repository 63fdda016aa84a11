"""What safetensors headers and indexes of shards may say: checked once, before anything uses it.

Format of a header: a JSON object with, for each tensor, its dtype, its shape and where its bytes
begin and end in the data behind the header; `__metadata__` maps strings to strings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np

from sage_grpo_jax.common import checked_json

SUFFIX = ".safetensors"
METADATA = "__metadata__"
# The format allows 100 MB; 100,000 tensors need a tenth of that, and JSON takes 20 times its size.
MAX_BYTES = 24 << 20
MAX_AXES, _MAX_SIZE = 16, 1 << 40
_MAX_NAME = 512
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor: the offset of its bytes in the data, its dtype and its shape."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


def parse_header(text: bytes) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Tensors in the order of their bytes, metadata, and how many bytes of data there must be.

    Raises:
      ValueError: naming the tensor and the field: not JSON, wrong types, unknown dtypes, shapes
        that do not fit the bytes, gaps, overlaps.
    """
    values = checked_json.parse(text, MAX_BYTES)
    metadata = checked_json.typed(values.pop(METADATA, {}), dict[str, str], METADATA)
    spans = {name: _span(name, value) for name, value in values.items()}

    # In the order of their bytes: each begins where the one before it ends.
    entries, end = {}, 0
    for name in sorted(spans, key=spans.__getitem__):
        entry, (start, stop) = _entry(name, values[name], spans[name][0]), spans[name]
        if start != end or stop - start != byte_count(entry.shape, entry.dtype):
            raise ValueError(
                f"tensor {name}: bytes {start} to {stop} for {entry.dtype}{list(entry.shape)}, "
                f"behind a tensor that ends at {end}"
            )
        entries[name], end = entry, stop
    return entries, metadata, end


def byte_count(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def check_name(name: str) -> str:
    """The name of a tensor, if it can be one: short, and printable in one line.

    Raises:
      ValueError: it is none.
    """
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ValueError(f"tensor {checked_json.shown(name)}: no name of a tensor")
    return name


def check_shape(shape: Collection[int], what: str) -> None:
    """Checks that a tensor in a file can have a shape.

    Args:
      shape: sizes of the axes.
      what: has it, for the message.

    Raises:
      ValueError: more axes or larger sizes than any tensor has, or negative ones.
    """
    if len(shape) > MAX_AXES or not all(0 <= size <= _MAX_SIZE for size in shape):
        raise ValueError(
            f"{what}={checked_json.shown(list(shape))}: must be at most {MAX_AXES} sizes, each 0 "
            f"to {_MAX_SIZE}"
        )


def parse_index(values: dict[str, Any]) -> dict[str, str]:
    """Name of the file of each tensor.

    Args:
      values: the JSON object of an index.

    Raises:
      ValueError: naming the field: another form, or files that are not beside the index.
    """
    files = checked_json.member(values, "weight_map", dict[str, str])
    checked_json.typed(values.get("metadata", {}), dict, "metadata")

    for name, file in files.items():
        check_name(name)
        plain = len(file) <= 255 and file.isprintable() and not {"/", "\\"} & set(file)
        if not plain or not file.endswith(SUFFIX):
            raise ValueError(
                f"weight_map: tensor {name}: {checked_json.shown(file)}: must be the name of a "
                f"*{SUFFIX} file beside the index"
            )
    return files


def _span(name: str, value: Any) -> tuple[int, int]:
    entry = checked_json.typed(value, dict, f"tensor {checked_json.shown(name)}")
    check_name(name)
    offsets = checked_json.member(
        entry, "data_offsets", tuple[int, int], f"tensor {name}: data_offsets"
    )
    if offsets[0] < 0:
        raise ValueError(f"tensor {name}: data_offsets={offsets}: must not be negative")
    return tuple(offsets)


def _entry(name: str, value: dict[str, Any], offset: int) -> Entry:
    shape = checked_json.member(value, "shape", list[int], f"tensor {name}: shape")
    check_shape(shape, f"tensor {name}: shape")
    dtype = checked_json.member(value, "dtype", str, f"tensor {name}: dtype")
    if dtype not in DTYPES:
        raise ValueError(
            f"tensor {name}: dtype={checked_json.shown(dtype)}: must be one of {list(DTYPES)}"
        )
    return Entry(offset, DTYPES[dtype], tuple(shape))
