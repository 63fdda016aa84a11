"""Writes embedding caches; see `embedding_cache` for what they are."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module

from sage_grpo_jax.common import folders
from sage_grpo_jax.data import embedding_records
from sage_grpo_jax.data.embedding_records import DTYPES, FIELDS
from sage_grpo_jax.data.prompts import Prompt

FORMAT_VERSION = 2
RECORDS = "embeddings.array_record"
MANIFEST = "manifest.json"
NEGATIVE_ID = ""
_PER_CLIP = ("image", "image_latents")  # for all prompts or for none; never for the negative entry


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What made the embeddings. Caches can be used together where `differences` finds none.

    name: of the text encoder.
    template_hash: SHA-256 of the prompt template, "" where there is none.
    versions: of the libraries that matter, by name.
    models: SHA-256 that identifies each network and tokenizer, by its role; {}: not known.
    """

    name: str
    template_hash: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    models: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> "Encoder":
        """The encoder that `dataclasses.asdict` was taken of.

        Raises:
          ValueError: it is not one; naming the field.
        """
        if not isinstance(values, dict):
            raise ValueError(f"the encoder is {values!r}; allowed: an object")
        if not values.get("name"):
            raise ValueError("the encoder has no name")
        kinds = {"name": str, "template_hash": str, "versions": dict, "models": dict}
        for field, value in values.items():
            # A field that is not known has no kind to be of, and is refused.
            if not isinstance(value, kinds.get(field, ())):
                raise ValueError(f"the encoder's {field} is {value!r}; allowed: {_listed(kinds)}")
        return cls(**values)

    def differences(self, other: "Encoder") -> str:
        """What this one has otherwise, as in "name is 'a', not 'b'"; "" where it is the same.

        Versions do not count: other libraries round otherwise, they do not mean otherwise. Neither
        do the models where one side does not know its own.
        """
        mine, others = self._identity(other), other._identity(self)
        return "; ".join(
            f"{field} is {_short(mine.get(field))}, not {_short(others.get(field))}"
            for field in sorted(mine.keys() | others.keys())
            if mine.get(field) != others.get(field)
        )

    def _identity(self, other: "Encoder") -> dict[str, str]:
        # What one side does not know cannot differ.
        models = self.models if other.models else {}
        found = {f"models.{role}": value for role, value in models.items()}
        return {"name": self.name, "template_hash": self.template_hash} | found


def _short(value: Any) -> str:
    """The beginning of a SHA-256, any other value whole."""
    return repr(value[:16] if isinstance(value, str) and len(value) == 64 else value)


def _listed(kinds: Mapping[str, type]) -> str:
    return ", ".join(f"{field} ({kind.__name__})" for field, kind in kinds.items())


class EmbeddingCacheWriter:
    """Writes a cache under a temporary name and renames it when it is complete.

    Use as a context manager: leaving it normally publishes the cache, an exception removes what
    was written. A cache that exists at `path` is never touched. `details` goes into the manifest
    as it is.

    Raises:
      FileExistsError: when `path` exists.
      ValueError: for an unknown dtype, a duplicate id, values that are not finite, shapes that do
        not fit each other, images for some prompts only, no prompts, or no negative entry.
      StorageError: the disk is full or broken.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        encoder: Encoder,
        dtype: str = "bfloat16",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        # Refused before anything is made.
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        self._path = pathlib.Path(path)
        if self._path.exists():
            raise FileExistsError(f"{self._path} exists; remove it or choose another name")

        # Folder and file. If the second cannot be opened, the stack takes the first away again.
        self._encoder, self._dtype, self._details = encoder, dtype, dict(details or {})
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(folders.new_folder(self._path, "embeddings"))
            # Groups of one record: a random read decompresses nothing but its own.
            self._writer = array_record_module.ArrayRecordWriter(
                str(self._folder / RECORDS), "group_size:1"
            )
            self._stack = stack.pop_all()

        # What the entries so far have in common, for checks and for the manifest.
        self._ids: set[str] = set()
        self._negative: dict[str, np.ndarray] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the first array of each field
        self._max_lengths: dict[str, int] = {}
        self._counts = dict.fromkeys(FIELDS, 0)
        self._hash = hashlib.sha256()

    def __enter__(self) -> "EmbeddingCacheWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        # Leaving the folder's context publishes it; an error that passes through it removes it.
        with self._stack:
            try:
                if kind is not None:
                    raise error
                self._finish()
            finally:
                if self._writer.is_open():
                    self._writer.close()

    def add(
        self,
        prompt: Prompt,
        text: np.ndarray,
        byt5: np.ndarray | None = None,
        *,
        image: np.ndarray | None = None,
        image_latents: np.ndarray | None = None,
    ) -> None:
        """Appends one prompt.

        Args:
          text: [L, D].
          byt5: [L2, D2], where the prompt quotes text.
          image: vision features [N, D3], and image_latents: the first frame's scaled latents
            [1, h, w, C]; for every prompt or for none.
        """
        # Its place among the others.
        if prompt.id == NEGATIVE_ID:
            raise ValueError("prompt id is empty; the empty id belongs to the negative entry")
        if prompt.id in self._ids:
            raise ValueError(f"prompt id {prompt.id!r} was added before; ids must differ")

        # The first prompt decides for all whether there are images.
        given = {"text": text, "byt5": byt5, "image": image, "image_latents": image_latents}
        for field in _PER_CLIP:
            if self._ids and (given[field] is None) == (field in self._shapes):
                have = "have none" if given[field] is not None else "have one"
                without = "an" if given[field] is not None else "no"
                raise ValueError(
                    f"prompt {prompt.id!r} has {without} {field}; the ones before {have}"
                )

        # Counted when nothing can be refused any more.
        arrays = self._checked(prompt.id, given)
        self._ids.add(prompt.id)
        for field in arrays:
            self._counts[field] += 1
        self._append(prompt, arrays)

    def set_negative(self, text: np.ndarray, byt5: np.ndarray | None = None) -> None:
        """Sets the embedding of the negative prompt, which all prompts share; byt5 as of `add`."""
        self._negative = self._checked(NEGATIVE_ID, {"text": text, "byt5": byt5})

    def _checked(self, name: str, given: Mapping[str, np.ndarray | None]) -> dict[str, np.ndarray]:
        arrays = {k: np.asarray(array) for k, array in given.items() if array is not None}
        for field, array in arrays.items():
            # The shape by itself.
            rank = FIELDS[field].count(",") + 1
            if array.ndim != rank or 0 in array.shape or (rank == 4 and len(array) != 1):
                raise ValueError(
                    f"{field} of {name!r} has shape {array.shape}; allowed: {FIELDS[field]}"
                )

            # The values as they will be read: what fits float32 may be infinite in float16.
            dtype = embedding_records.dtype_of(field, self._dtype)
            with np.errstate(over="ignore"):
                stored = array.astype(DTYPES[dtype]).astype(np.float32)
            if not np.isfinite(stored).all():
                raise ValueError(f"{field} of {name!r} has values that are not finite in {dtype}")

            # The shape beside those of before.
            first = self._shapes.setdefault(field, array.shape)
            if field in _PER_CLIP and array.shape != first:
                raise ValueError(
                    f"{field} of {name!r} has shape {array.shape}; the ones before have {first}"
                )
            if array.shape[-1] != first[-1]:
                raise ValueError(
                    f"{field} of {name!r} has width {array.shape[-1]}; the ones before have "
                    f"{first[-1]}"
                )

        for field, array in arrays.items():
            self._max_lengths[field] = max(self._max_lengths.get(field, 0), len(array))
        return arrays

    def _append(self, prompt: Prompt, arrays: dict[str, np.ndarray]) -> None:
        record = embedding_records.pack(prompt.id, prompt.text, self._dtype, arrays)
        self._writer.write(record)
        # Over the records in their order, which `EmbeddingCache.verify` goes through again.
        self._hash.update(record)

    def _finish(self) -> None:
        if not self._ids:
            raise ValueError(f"{self._path}: no prompts were added")
        if self._negative is None:
            raise ValueError(f"{self._path}: the negative entry was not set")
        # The last record, so that entry i of the file is prompt i.
        self._append(Prompt(NEGATIVE_ID, ""), self._negative)
        self._writer.close()
        (self._folder / MANIFEST).write_text(json.dumps(self._manifest(), indent=2) + "\n")

    def _manifest(self) -> dict[str, Any]:
        def shape(field: str) -> list[int] | None:
            return list(self._shapes[field]) if field in self._shapes else None

        return {
            "format_version": FORMAT_VERSION,
            "encoder": dataclasses.asdict(self._encoder),
            "dtype": self._dtype,
            "dim": self._shapes["text"][-1],
            "byt5_dim": self._shapes["byt5"][-1] if "byt5" in self._shapes else None,
            "image_shape": shape("image"),
            "image_latents_shape": shape("image_latents"),
            "max_length": self._max_lengths["text"],
            "byt5_max_length": self._max_lengths.get("byt5", 0),
            "count": len(self._ids),
            "counts": self._counts,
            "negative": len(self._ids),
            "details": self._details,
            "sha256": self._hash.hexdigest(),
        }
