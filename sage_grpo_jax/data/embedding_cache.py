"""Prompt embeddings, computed once and read at random by every training run.

A cache is a folder with two files:

    embeddings.array_record   one record a prompt, and one for the negative (empty) prompt
    manifest.json             who wrote it and how, its sizes, and where the negative entry is

Embeddings are stored without padding, in bfloat16, float16 or float32: "text" always; "byt5"
(glyph embeddings) only for prompts that quote text; "image" (vision features) and "image_latents"
(the encoded first frame) for image-to-video, then for every prompt. The layout of a record is in
`embedding_records`; batches of entries are made in `embedding_batches` and reached from here.
"""

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.data import embedding_records
from sage_grpo_jax.data.embedding_batches import (
    BYT5_LENGTHS,
    LENGTHS,
    make_prompt_iterator,
    pad_entries,
    text_bucket,
)
from sage_grpo_jax.data.embedding_records import DTYPES, FIELDS, Entry
from sage_grpo_jax.data.embedding_writer import (
    FORMAT_VERSION,
    MANIFEST,
    RECORDS,
    EmbeddingCacheWriter,
    Encoder,
)
from sage_grpo_jax.data.prompts import Prompt

__all__ = [
    "BYT5_LENGTHS",
    "LENGTHS",
    "EmbeddingCache",
    "EmbeddingCacheWriter",
    "Encoder",
    "Entry",
    "make_prompt_iterator",
    "pad_entries",
    "text_bucket",
    "write_cache",
]

READABLE_VERSIONS = (1, FORMAT_VERSION)  # 1: text and byt5 only
_FIELDS = {
    "dtype": str, "sha256": str, "dim": int, "max_length": int, "count": int, "negative": int,
    "byt5_dim": int | None, "byt5_max_length": int | None,
    "image_shape": tuple[int, int] | None,
    "image_latents_shape": tuple[int, int, int, int] | None,
}  # fmt: skip
# Sizes decide what is allocated: a damaged or made-up manifest must not name huge ones.
_MOST = 1 << 24
_REQUIRED = ("encoder", "dtype", "dim", "max_length", "count", "negative", "sha256")


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


class EmbeddingCache:
    """Random access to a cache; a source for `grain.MapDataset.source`.

    `cache[i]` is an Entry with float32 arrays; `len(cache)` does not count the negative entry,
    which is `cache.negative`. All entries of a cache have the same fields: where any prompt has
    byt5, one that quotes nothing has byt5 of length 0.

    Attributes:
      dim, byt5_dim: widths; byt5_dim is None where no prompt, nor the negative one, quotes text.
      max_length, byt5_max_length: tokens of the longest.
      image_shape: (N, D3), and image_latents_shape: (1, h, w, C); None for text-to-video.

    Raises:
      FileNotFoundError: when the folder or one of its files is missing.
      ValueError: for a manifest that this version cannot read, or a record file that does not
        have as many records as the manifest says; for a record, when it is read.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        # What the manifest says.
        self.path = pathlib.Path(path)
        self.manifest = _read_manifest(self.path)

        # What is there, without reading it all: `_entry` checks each record when it is wanted.
        records = self.path / RECORDS
        if not records.exists():
            raise FileNotFoundError(f"{records} is missing; write the embedding cache again")
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(records)])
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{records} cannot be read: {error}") from error
        if len(self._records) != self.manifest["count"] + 1:
            raise ValueError(
                f"{records} has {len(self._records)} records; the manifest says "
                f"{self.manifest['count'] + 1} with the negative entry; write the cache again"
            )

        self.dim: int = self.manifest["dim"]
        self.max_length: int = self.manifest["max_length"]
        self.byt5_dim: int | None = self.manifest.get("byt5_dim")
        self.byt5_max_length: int = self.manifest.get("byt5_max_length") or 0
        self.image_shape = _shape(self.manifest.get("image_shape"))
        self.image_latents_shape = _shape(self.manifest.get("image_latents_shape"))
        self.encoder = Encoder.from_dict(self.manifest["encoder"])

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        return self._entry(index)

    @property
    def negative(self) -> Entry:
        """The entry of the negative prompt: text, and byt5 where any prompt has it."""
        return self._entry(self.manifest["negative"])

    def _entry(self, index: int) -> Entry:
        """The entry of a prompt, checked.

        Raises:
          ValueError: naming file and record: damaged, or not as the manifest says.
        """
        try:
            entry = embedding_records.parse(self._records[int(index)])
            self._check(entry)
        except (ValueError, RuntimeError, IndexError) as error:  # array_record raises all of them
            raise ValueError(
                f"{self.path / RECORDS}: record {index} cannot be read: {error}; write the cache "
                "again"
            ) from error
        # The same fields in every entry, so that all batches have one structure.
        if self.byt5_dim is not None and "byt5" not in entry:
            entry["byt5"] = np.zeros((0, self.byt5_dim), np.float32)
        return entry

    def _check(self, entry: Entry) -> None:
        """That a record's arrays are as large as the manifest says, and finite."""
        allowed = {
            "text": (self.max_length, self.dim),
            "byt5": (self.byt5_max_length, self.byt5_dim),
            "image": self.image_shape,
            "image_latents": self.image_latents_shape,
        }
        if "text" not in entry:
            raise ValueError("it has no text")
        for field in FIELDS:
            if field not in entry:
                continue
            shape, most = entry[field].shape, allowed[field]
            # Texts are shorter than the longest.
            if most is None or shape[1:] != most[1:] or not 0 < shape[0] <= most[0]:
                raise ValueError(f"{field} has the shape {shape}; the manifest allows {most}")
            if not np.isfinite(entry[field]).all():
                raise ValueError(f"{field} has values that are not finite")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all entries. An iterator's state is a position: it fits this cache only."""
        return self.manifest["sha256"]

    def __repr__(self) -> str:
        return f"EmbeddingCache({self.manifest['sha256'][:16]}, {len(self)} prompts)"

    def lengths(
        self, length: int | None = None, byt5_length: int | None = None
    ) -> tuple[int, int | None]:
        """Static lengths of text and byt5 that hold every prompt: those given, else buckets.

        Raises:
          ValueError: when a given length is too short, or no bucket is long enough.
        """
        if length is None:
            length = text_bucket(self.max_length)
        if byt5_length is None and self.byt5_dim is not None:
            byt5_length = text_bucket(self.byt5_max_length, BYT5_LENGTHS)
        if self.max_length > length:
            raise ValueError(f"length is {length}; the longest prompt has {self.max_length} tokens")
        if byt5_length is not None and self.byt5_max_length > byt5_length:
            raise ValueError(
                f"byt5_length is {byt5_length}; the longest prompt has {self.byt5_max_length} "
                "tokens of byt5"
            )
        return length, byt5_length

    def pad(
        self, entries: Sequence[Entry], length: int | None = None, byt5_length: int | None = None
    ) -> dict[str, Any]:
        """`pad_entries` with the static lengths of this cache, also for `[cache.negative]`."""
        return pad_entries(entries, *self.lengths(length, byt5_length))

    def verify(self) -> None:
        """Reads every record; ValueError when they are not those that were written."""
        # In the order of writing, the negative entry last.
        digest = hashlib.sha256()
        for index in range(len(self._records)):
            digest.update(self._records[index])
        if digest.hexdigest() != self.fingerprint:
            raise ValueError(f"{self.path / RECORDS} is damaged: its SHA-256 is not the manifest's")

    def check_fits(
        self,
        *,
        text_dim: int,
        byt5_dim: int | None = None,
        image_dim: int | None = None,
        latent_shape: Sequence[int] | None = None,
        encoder: str | None = None,
    ) -> None:
        """Refuses a cache that a model cannot be conditioned on.

        Args:
          text_dim, byt5_dim, image_dim: widths that the model takes; None: it takes no such input.
          latent_shape: (h, w, C) of the condition frame of image-to-video; None for text-to-video.
          encoder: name that the cache's encoder must have; None for any.

        Raises:
          ValueError: with all that does not fit, in one line.
        """
        # All of it at once: a cache that has to be written again is hours of work.
        wrong = []

        def check(field: str, found: Any, allowed: Any) -> None:
            if found != allowed:
                wrong.append(f"{field} is {found}, the model takes {allowed}")

        # A cache without quoted text suits any model; one with it only a model that reads it.
        check("text width", self.dim, text_dim)
        if self.byt5_dim is not None:
            check("byt5 width", self.byt5_dim, byt5_dim)

        # First frames: there with image-to-video, and only there.
        if self.image_shape is not None:
            check("image width", self.image_shape[-1], image_dim)
        if latent_shape is not None and self.image_shape is None:
            check("image width", None, image_dim)
        wanted = None if latent_shape is None else tuple(latent_shape)[-3:]
        found = self.image_latents_shape
        check("shape of the first frame's latents (h, w, C)", found and found[-3:], wanted)

        if encoder is not None:
            check("encoder", repr(self.encoder.name), repr(encoder))
        if wrong:
            raise ValueError(
                f"embedding cache {self.path} (encoder {self.encoder.name!r}) does not fit: "
                + "; ".join(wrong)
            )


def _shape(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    # Is it a manifest?
    file = path / MANIFEST
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; no embedding cache at {path}")
    try:
        manifest = checked_json.load(file)
    except ValueError as error:
        raise ValueError(f"{error}; write the cache again") from error

    # Of a version that we know? (Not isinstance: `true` would pass as 1.)
    version = manifest.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        allowed = ", ".join(map(str, READABLE_VERSIONS))
        raise ValueError(
            f"{file}: format_version is {checked_json.shown(version)}; allowed: {allowed}; write "
            "the cache again"
        )

    # In a version that we know, the fields mean what the writer meant.
    missing = [field for field in _REQUIRED if manifest.get(field) in (None, "")]
    if missing:
        raise ValueError(f"{file}: no {', '.join(missing)}; write the cache again")
    try:
        _check_fields(manifest)
        Encoder.from_dict(manifest["encoder"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}; write the cache again") from error
    return manifest


def _check_fields(manifest: dict[str, Any]) -> None:
    """Types and bounds of what the manifest says about the records."""
    for field, hint in _FIELDS.items():
        # One number, or those of a shape; none where a cache has no such input.
        value = checked_json.typed(manifest.get(field), hint, field)
        sizes = value if isinstance(value, list) else [value] * isinstance(value, int)
        least = 0 if field == "byt5_max_length" else 1
        if not all(least <= size <= _MOST for size in sizes):
            raise ValueError(f"{field} is {value}; allowed: {least} to {_MOST}")
    if manifest["dtype"] not in DTYPES:
        raise ValueError(
            f"dtype is {checked_json.shown(manifest['dtype'])}; allowed: {', '.join(DTYPES)}"
        )
    if manifest["negative"] != manifest["count"]:
        raise ValueError(f"negative is {manifest['negative']}; allowed: the last record")
