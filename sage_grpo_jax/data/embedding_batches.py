"""Batches of an embedding cache: padded to static lengths, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import chex
import grain
import numpy as np

from sage_grpo_jax.data.embedding_records import Entry

# Static lengths; a batch is padded to the smallest that holds the longest prompt of its cache.
# 1000 and 256 tokens are the most that the encoders give.
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1000)
BYT5_LENGTHS = (64, 128, 256)

# Batches read ahead. Grain's default is 500, and a batch may well be 200 MB.
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


class Entries(Protocol):
    """What batches are made of: an `embedding_cache.EmbeddingCache`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Entry: ...

    def lengths(self, length: int | None, byt5_length: int | None) -> tuple[int | None, int | None]:
        """Static lengths that hold every entry: those that are given, or the smallest."""
        ...


def text_bucket(max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
    """The smallest static length that holds `max_length` tokens; ValueError when none does."""
    for length in sorted(lengths):
        if max_length <= length:
            return length
    raise ValueError(f"text of {max_length} tokens; the longest allowed is {max(lengths)}")


def pad_entries(
    entries: Sequence[Entry],
    length: int,
    byt5_length: int | None = None,
    byt5_dim: int | None = None,
) -> dict[str, Any]:
    """Stacks P entries of one cache.

    Args:
      length: tokens that text is padded to.
      byt5_length: tokens that byt5 is padded to; None for the smallest of `BYT5_LENGTHS` that
        holds these entries.
      byt5_dim: width of byt5 for entries that have none; the keys are then there in any case, so
        that caches with and without quoted text give the same structure.

    Returns:
      ids and prompts list[str]; text f32[P, length, D], mask bool[P, length]; where the entries
      have them, byt5 f32[P, byt5_length, D2] and byt5_mask, image f32[P, N, D3] and image_mask,
      image_latents f32[P, 1, h, w, C]. Padding is zero and masked.

    Raises:
      ValueError: when an entry has more tokens than allowed, or only some have an image.
    """
    # Text: [P, length, D].
    batch: dict[str, Any] = {
        "ids": [entry["id"] for entry in entries],
        "prompts": [entry["prompt"] for entry in entries],
    }
    batch["text"], batch["mask"] = _pad(entries, "text", length)

    # Quoted text: an entry without any gets none of its tokens marked in the mask.
    if byt5_dim is not None:
        empty = np.zeros((0, byt5_dim), np.float32)
        entries = [{"byt5": empty, **entry} for entry in entries]
    if any("byt5" in entry for entry in entries):
        if byt5_length is None:
            longest = max(len(entry.get("byt5", ())) for entry in entries)
            byt5_length = text_bucket(longest, BYT5_LENGTHS)
        batch["byt5"], batch["byt5_mask"] = _pad(entries, "byt5", byt5_length)

    # First frames: every clip has one, or none has; all are of one size, so nothing is padded.
    for field in ("image", "image_latents"):
        without = [entry["id"] for entry in entries if field not in entry]
        if len(without) == len(entries):
            continue
        if without:
            raise ValueError(f"prompt {without[0]!r} has no {field}; others of its batch have")
        batch[field] = np.stack([entry[field] for entry in entries])
    if "image" in batch:
        batch["image_mask"] = np.ones(batch["image"].shape[:2], bool)
    return batch


def _pad(entries: Sequence[Entry], field: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Values f32[P, length, D] and mask bool[P, length]; entries without the field are masked."""
    # The width is that of any entry that has the field.
    dim = next(entry[field].shape[1] for entry in entries if field in entry)
    values = np.zeros((len(entries), length, dim), np.float32)
    mask = np.zeros((len(entries), length), bool)
    for row, entry in enumerate(entries):
        if field not in entry:
            continue
        tokens = entry[field]
        chex.assert_shape(tokens, (None, dim))
        # Never cut silently: a prompt without its end is another prompt.
        if len(tokens) > length:
            what = "" if field == "text" else f" of {field}"
            raise ValueError(
                f"prompt {entry['id']!r} has {len(tokens)} tokens{what}, allowed {length}"
            )
        values[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return values, mask


def make_prompt_iterator(
    cache: Entries,
    prompts_per_step: int,
    seed: int,
    *,
    length: int | None = None,
    byt5_length: int | None = None,
    byt5_dim: int | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over batches of `pad_entries`, by default the same on every host.

    The order is reshuffled every epoch and depends on the seed only. Epochs are joined, so that
    with `repeat` every batch is full; without it the last, incomplete batch is dropped.
    `get_state` and `set_state` continue exactly; the iterator is also a checkpointable for orbax.

    Args:
      length: static text length; None for the smallest of `LENGTHS` that holds every prompt.
      byt5_length: the same for byt5 and `BYT5_LENGTHS`.
      byt5_dim: see `pad_entries`.
      process_index, process_count: with a count above 1 each process reads and gets its own rows
        of every batch only, rows `process_index::process_count`.

    Raises:
      ValueError: when prompts_per_step is below 1, above len(cache) without `repeat`, or no
        multiple of process_count; when process_index is not below process_count; or when the
        longest prompt does not fit.
    """
    _check_split(cache, prompts_per_step, repeat, process_index, process_count)

    # One length for the whole run: another one would be another program to compile.
    length, byt5_length = cache.lengths(length, byt5_length)
    dataset = grain.MapDataset.source(cache)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    # Whole batches only, before they are split: all processes end after the same one.
    dataset = dataset.repeat() if repeat else dataset[: _whole(len(cache), prompts_per_step)]
    if process_count > 1:
        dataset = dataset[process_index::process_count]
    # The stride above leaves every process whole batches of its share.
    padded = dataset.batch(
        prompts_per_step // process_count,
        drop_remainder=True,
        batch_fn=lambda entries: pad_entries(entries, length, byt5_length, byt5_dim),
    )
    return iter(padded.to_iter_dataset(_READ_AHEAD))


def _whole(count: int, unit: int) -> int:
    return count - count % unit


def _check_split(
    cache: Entries, prompts_per_step: int, repeat: bool, index: int, count: int
) -> None:
    if prompts_per_step < 1:
        raise ValueError(f"prompts_per_step is {prompts_per_step}; allowed: at least 1")
    if not repeat and prompts_per_step > len(cache):
        raise ValueError(
            f"prompts_per_step is {prompts_per_step}; allowed without repeat: at most the "
            f"{len(cache)} prompts of the cache"
        )
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"process_index is {index}, process_count is {count}; allowed: 0 <= index < count"
        )
    if prompts_per_step % count:
        raise ValueError(
            f"prompts_per_step is {prompts_per_step}; allowed: a multiple of the {count} processes"
        )
