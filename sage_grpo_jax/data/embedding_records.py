"""How one prompt's embeddings are laid out in a record of an embedding cache.

A record is a length (4 bytes, little-endian), a JSON header of that length, and the raw values of
the arrays that the header names, without padding and without gaps.
"""

import json
import math
import struct
from typing import Any

import ml_dtypes
import numpy as np

from sage_grpo_jax.common import checked_json

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

# What an entry may hold, and the axes of each.
FIELDS = {
    "text": "[L, D]",
    "byt5": "[L, D]",
    "image": "[N, D]",
    "image_latents": "[1, h, w, C]",
}

# id, prompt: str; text f32[L, D]; then, where the cache has them, byt5 f32[L2, D2] (L2 = 0 for a
# prompt that quotes nothing), image f32[N, D3], image_latents f32[1, h, w, C].
Entry = dict[str, Any]


def pack(name: str, prompt: str, dtype: str, arrays: dict[str, np.ndarray]) -> bytes:
    """The record of one prompt.

    Args:
      dtype: what the values are stored as; `image_latents` are always float32: they are few, and
        they stand beside float32 latents.
    """
    # bfloat16 halves the file, and is what the encoders compute in by default.
    stored = {
        field: array.astype(DTYPES[dtype_of(field, dtype)]) for field, array in arrays.items()
    }
    header = {
        "id": name,
        "prompt": prompt,
        "dtype": dtype,
        "shapes": {field: list(array.shape) for field, array in stored.items()},
    }
    encoded = json.dumps(header).encode()
    values = b"".join(array.tobytes() for array in stored.values())
    return struct.pack("<I", len(encoded)) + encoded + values


def parse(record: bytes) -> Entry:
    """The entry of a record, in float32.

    Raises:
      ValueError: damaged: no header, or one that does not fit the record.
    """
    # The header. A record may be damaged: a length is believed once the bytes for it are there.
    length = int.from_bytes(record[:4], "little")
    if 4 + length > len(record):
        raise ValueError(f"its header is cut off ({len(record)} bytes)")
    header = checked_json.parse(record[4 : 4 + length])
    offset = 4 + length
    entry: Entry = {name: checked_json.member(header, name, str) for name in ("id", "prompt")}
    stored_as = checked_json.member(header, "dtype", str)
    if stored_as not in DTYPES:
        raise ValueError(f"dtype={checked_json.shown(stored_as)}: must be one of {list(DTYPES)}")

    # The arrays, one after the other.
    for field, shape in checked_json.member(header, "shapes", dict[str, list[int]]).items():
        axes = FIELDS.get(field, "").count(",") + 1
        if field not in FIELDS or len(shape) != axes or not all(0 < n < 1 << 32 for n in shape):
            raise ValueError(f"shapes: {checked_json.shown({field: shape})}: must be of {FIELDS}")
        # Checked before anything of this size is made.
        dtype, count = DTYPES[dtype_of(field, stored_as)], math.prod(shape)
        if offset + count * dtype.itemsize > len(record):
            raise ValueError(f"record of {_shown(entry)} ends within {field}")
        values = np.frombuffer(record, dtype, count, offset)
        entry[field] = values.reshape(shape).astype(np.float32)
        offset += count * dtype.itemsize

    # Bytes left over mean that header and values are not of one record.
    if offset != len(record):
        raise ValueError(f"record of {_shown(entry)} has {len(record)} bytes, expected {offset}")
    return entry


def _shown(entry: Entry) -> str:
    return checked_json.shown(entry["id"])


def dtype_of(field: str, dtype: str) -> str:
    """What a field is stored as in a cache of a dtype."""
    return "float32" if field == "image_latents" else dtype
