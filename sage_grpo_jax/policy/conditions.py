"""Batches of prompts with their embeddings, and the model's condition made from them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import TransformerConfig
from sage_grpo_jax.parallel import hosts

# Optional arrays of a batch: see `data.embedding_cache.pad_entries`.
OPTIONAL = ("byt5", "byt5_mask", "image", "image_mask", "image_latents")


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """P prompts with their embeddings."""

    ids: list[str]
    prompts: list[str]
    text: np.ndarray  # [P, L, D]
    mask: np.ndarray  # bool [P, L]
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # some of OPTIONAL

    def take(self, rows: np.ndarray | list[int]) -> "PromptBatch":
        """The given rows, in that order; rows may repeat."""
        rows = np.asarray(rows)
        return PromptBatch(
            [self.ids[r] for r in rows],
            [self.prompts[r] for r in rows],
            self.text[rows],
            self.mask[rows],
            {name: array[rows] for name, array in self.extras.items()},
        )

    def repeat(self, count: int) -> "PromptBatch":
        """Every prompt `count` times in a row: the members of a group."""
        return self.take(np.repeat(np.arange(len(self.ids)), count))


def batches(iterator: Iterator[dict[str, Any]]) -> Iterator[PromptBatch]:
    """`PromptBatch`es from the dicts of `data.embedding_cache.make_prompt_iterator`."""
    for item in iterator:
        extras = {name: item[name] for name in OPTIONAL if name in item}
        yield PromptBatch(
            list(item["ids"]), list(item["prompts"]), item["text"], item["mask"], extras
        )


def to_condition(
    batch: PromptBatch,
    place: jax.sharding.Sharding,
    transformer: TransformerConfig,
    latent_frames: int,
) -> Any:
    """The condition of P samples on the mesh, as the transformer's `make_condition` makes it.

    Args:
      batch: P prompts; P must divide over the mesh unless `place` replicates.
      place: sharding of every leaf.
      transformer: config of the transformer.
      latent_frames: of a clip.
    """
    arrays = {"text": batch.text, "text_mask": batch.mask, **batch.extras}
    # The condition is made on the host; each process puts onto its devices the rows that they hold.
    condition = registry.of(transformer).make_condition(arrays, transformer, latent_frames)
    return jax.tree.map(lambda leaf: hosts.to_global(np.asarray(leaf), place), condition)
