"""Prompt embeddings, computed once and read at random by every training run.

A cache is a folder with two files:

    embeddings.array_record   one record a prompt, and one for the negative (empty) prompt
    manifest.json             who wrote it and how, its sizes, and where the negative entry is

Embeddings are stored without padding, in bfloat16 or float32. A record is a length (4 bytes,
little-endian), a JSON header of that length, and the raw values of the arrays that it names:
"text" always; "byt5" (glyph embeddings) only for prompts that quote text.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import grain
import ml_dtypes
import numpy as np
from array_record.python import array_record_module

from sage_grpo_jax.data.prompts import Prompt

FORMAT_VERSION = 1
RECORDS = "embeddings.array_record"
MANIFEST = "manifest.json"
NEGATIVE_ID = ""

# Static text lengths; a batch is padded to the smallest that holds the longest prompt.
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

Entry = dict[str, Any]  # id, prompt: str; text: f32[L, D]; byt5: f32[L2, D2] where there is one


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What made the embeddings. Two caches can stand in for each other if this is equal.

    template_hash: SHA-256 of the prompt template, "" where there is none.
    versions: of the libraries that matter, by name.
    """

    name: str
    template_hash: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def write_cache(
    path: str | pathlib.Path,
    prompts: Iterable[Prompt],
    encode: Callable[[str], np.ndarray],
    encoder: Encoder,
    dtype: str = "bfloat16",
) -> None:
    """Encodes prompts, and the empty one, and writes them to a new cache.

    Args:
      encode: text -> f32[L, D], called once a prompt and once for "".
    """
    with EmbeddingCacheWriter(path, encoder, dtype) as writer:
        for prompt in prompts:
            writer.add(prompt, encode(prompt.text))
        writer.set_negative(encode(""))


class EmbeddingCacheWriter:
    """Writes a cache under a temporary name and renames it when it is complete.

    Use as a context manager: leaving it normally publishes the cache, an exception removes what
    was written. A cache that exists at `path` is never touched.

    Raises:
      FileExistsError: when `path` exists.
      ValueError: for an unknown dtype, a duplicate id, values that are not finite, widths that
        differ, no prompts, or no negative entry.
    """

    def __init__(self, path: str | pathlib.Path, encoder: Encoder, dtype: str = "bfloat16"):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
        self._path = pathlib.Path(path)
        if self._path.exists():
            raise FileExistsError(f"{self._path} exists; remove it or choose another name")
        self._encoder, self._dtype = encoder, dtype
        self._folder = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        # Groups of one record: a random read decompresses nothing but its own.
        self._writer = array_record_module.ArrayRecordWriter(
            str(self._folder / RECORDS), "group_size:1"
        )
        self._ids: set[str] = set()
        self._negative: dict[str, np.ndarray] | None = None
        self._dims: dict[str, int] = {}
        self._max_lengths: dict[str, int] = {}
        self._hash = hashlib.sha256()

    def __enter__(self) -> "EmbeddingCacheWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self._writer.is_open():
                self._writer.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, prompt: Prompt, text: np.ndarray, byt5: np.ndarray | None = None) -> None:
        """Appends one prompt: text [L, D] and, where it quotes text, byt5 [L2, D2]."""
        if prompt.id == NEGATIVE_ID:
            raise ValueError("prompt id is empty; the empty id belongs to the negative entry")
        if prompt.id in self._ids:
            raise ValueError(f"prompt id {prompt.id!r} was added before; ids must differ")
        self._ids.add(prompt.id)
        self._append(prompt, self._checked(prompt.id, text, byt5))

    def set_negative(self, text: np.ndarray, byt5: np.ndarray | None = None) -> None:
        """Sets the embedding of the empty prompt, which all prompts share."""
        self._negative = self._checked(NEGATIVE_ID, text, byt5)

    def _checked(
        self, name: str, text: np.ndarray, byt5: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        arrays = {"text": text} if byt5 is None else {"text": text, "byt5": byt5}
        for field, array in arrays.items():
            array = np.asarray(array)
            if array.ndim != 2 or 0 in array.shape:
                raise ValueError(f"{field} of {name!r} has shape {array.shape}; allowed: [L, D]")
            if not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"{field} of {name!r} has values that are not finite")
            dim = self._dims.setdefault(field, array.shape[1])
            if array.shape[1] != dim:
                raise ValueError(
                    f"{field} of {name!r} has width {array.shape[1]}; the ones before have {dim}"
                )
            self._max_lengths[field] = max(self._max_lengths.get(field, 0), len(array))
        return {field: np.asarray(array) for field, array in arrays.items()}

    def _append(self, prompt: Prompt, arrays: dict[str, np.ndarray]) -> None:
        stored = {field: array.astype(_DTYPES[self._dtype]) for field, array in arrays.items()}
        shapes = {field: list(array.shape) for field, array in stored.items()}
        header = {"id": prompt.id, "prompt": prompt.text, "dtype": self._dtype, "shapes": shapes}
        encoded = json.dumps(header).encode()
        record = struct.pack("<I", len(encoded)) + encoded
        record += b"".join(array.tobytes() for array in stored.values())
        self._writer.write(record)
        self._hash.update(record)

    def _publish(self) -> None:
        if not self._ids:
            raise ValueError(f"{self._path}: no prompts were added")
        if self._negative is None:
            raise ValueError(f"{self._path}: the negative entry was not set")
        self._append(Prompt(NEGATIVE_ID, ""), self._negative)
        self._writer.close()
        manifest = {
            "format_version": FORMAT_VERSION,
            "encoder": dataclasses.asdict(self._encoder),
            "dtype": self._dtype,
            "dim": self._dims["text"],
            "byt5_dim": self._dims.get("byt5"),
            "max_length": self._max_lengths["text"],
            "byt5_max_length": self._max_lengths.get("byt5", 0),
            "count": len(self._ids),
            "negative": len(self._ids),
            "sha256": self._hash.hexdigest(),
        }
        (self._folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        self._folder.rename(self._path)


class EmbeddingCache:
    """Random access to a cache; a source for `grain.MapDataset.source`.

    `cache[i]` is an Entry with float32 arrays; `len(cache)` does not count the negative entry,
    which is `cache.negative`.

    Raises:
      FileNotFoundError: when the folder or one of its files is missing.
      ValueError: for a manifest that this version cannot read, or a record file that does not
        have as many records as the manifest says.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.manifest = _read_manifest(self.path)
        records = self.path / RECORDS
        if not records.exists():
            raise FileNotFoundError(f"{records} is missing; write the embedding cache again")
        self._records = grain.sources.ArrayRecordDataSource([str(records)])
        if len(self._records) != self.manifest["count"] + 1:
            raise ValueError(
                f"{records} has {len(self._records)} records; the manifest says "
                f"{self.manifest['count'] + 1} with the negative entry; write the cache again"
            )
        self.dim: int = self.manifest["dim"]
        self.max_length: int = self.manifest["max_length"]
        self.encoder = Encoder(**self.manifest["encoder"])

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        return _parse(self._records[int(index)])

    @property
    def negative(self) -> Entry:
        """The entry of the empty prompt."""
        return _parse(self._records[self.manifest["negative"]])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all entries. An iterator's state is a position: it fits this cache only."""
        return self.manifest["sha256"]

    def __repr__(self) -> str:
        return f"EmbeddingCache({self.manifest['sha256'][:16]}, {len(self)} prompts)"


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; no embedding cache at {path}")
    manifest = json.loads(file.read_text())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version is {manifest.get('format_version')}; allowed: "
            f"{FORMAT_VERSION}; write the cache again"
        )
    return manifest


def _parse(record: bytes) -> Entry:
    (length,) = struct.unpack_from("<I", record)
    header = json.loads(record[4 : 4 + length])
    dtype, offset = _DTYPES[header["dtype"]], 4 + length
    entry: Entry = {"id": header["id"], "prompt": header["prompt"]}
    for field, shape in header["shapes"].items():
        count = shape[0] * shape[1]
        values = np.frombuffer(record, dtype, count, offset)
        entry[field] = values.reshape(shape).astype(np.float32)
        offset += count * dtype.itemsize
    if offset != len(record):
        raise ValueError(f"record of {header['id']!r} has {len(record)} bytes, expected {offset}")
    return entry


def text_bucket(max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest static length that holds `max_length` tokens; ValueError when none does."""
    for length in sorted(lengths):
        if max_length <= length:
            return length
    raise ValueError(f"text of {max_length} tokens; the longest allowed is {max(lengths)}")


def pad_entries(entries: Sequence[Entry], length: int) -> dict[str, Any]:
    """Stacks P entries: ids and prompts list[str], text f32[P, length, D], mask bool[P, length].

    Raises:
      ValueError: when an entry has more than `length` tokens.
    """
    dim = entries[0]["text"].shape[1]
    text = np.zeros((len(entries), length, dim), np.float32)
    mask = np.zeros((len(entries), length), bool)
    for row, entry in enumerate(entries):
        tokens = entry["text"]
        chex.assert_shape(tokens, (None, dim))
        if len(tokens) > length:
            raise ValueError(f"prompt {entry['id']!r} has {len(tokens)} tokens, allowed {length}")
        text[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return {
        "ids": [entry["id"] for entry in entries],
        "prompts": [entry["prompt"] for entry in entries],
        "text": text,
        "mask": mask,
    }


def make_prompt_iterator(
    cache: EmbeddingCache,
    prompts_per_step: int,
    seed: int,
    *,
    length: int | None = None,
    shuffle: bool = True,
    repeat: bool = True,
) -> grain.DatasetIterator:
    """Iterates over batches of `pad_entries`, the same on every host.

    The order is reshuffled every epoch. Epochs are joined, so that with `repeat` every batch is
    full; without it the last, incomplete batch is dropped. `get_state` and `set_state` continue
    exactly; the iterator is also a checkpointable for orbax.

    Args:
      length: static text length; None for the smallest of `LENGTHS` that holds every prompt.

    Raises:
      ValueError: when prompts_per_step is below 1, above len(cache) without `repeat`, or the
        longest prompt does not fit `length`.
    """
    if prompts_per_step < 1:
        raise ValueError(f"prompts_per_step is {prompts_per_step}; allowed: at least 1")
    if not repeat and prompts_per_step > len(cache):
        raise ValueError(
            f"prompts_per_step is {prompts_per_step}; allowed without repeat: at most the "
            f"{len(cache)} prompts of the cache"
        )
    if length is None:
        length = text_bucket(cache.max_length)
    if cache.max_length > length:
        raise ValueError(f"length is {length}; the longest prompt has {cache.max_length} tokens")
    dataset = grain.MapDataset.source(cache)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    if repeat:
        dataset = dataset.repeat()
    padded = dataset.batch(
        prompts_per_step,
        drop_remainder=True,
        batch_fn=lambda entries: pad_entries(entries, length),
    )
    return iter(padded.to_iter_dataset())
