"""Batches of prompts with their embeddings, and the model's condition made from them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.data import image_condition
from sage_grpo_jax.models import hunyuan_video
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
    batch: PromptBatch, place: jax.sharding.Sharding, dtype: str, frames: int
) -> hunyuan_video.Condition:
    """The condition of P samples on the mesh.

    Args:
      batch: P prompts; P must divide over the mesh unless `place` replicates.
      place: sharding of every leaf.
      dtype: of the embeddings, the compute dtype of the model.
      frames: latent frames T of a clip, for image-to-video.
    """

    def put(array: np.ndarray, kind: Any) -> jax.Array:
        return hosts.to_global(np.asarray(array).astype(kind), place)

    extras = {
        name: put(array, bool if name.endswith("_mask") else jnp.dtype(dtype))
        for name, array in batch.extras.items()
        if name != "image_latents"
    }
    if "image_latents" in batch.extras:
        latents = image_condition.condition_latents(batch.extras["image_latents"], frames)
        extras["latents"] = put(latents, np.float32)
    return hunyuan_video.Condition(
        text=put(batch.text, jnp.dtype(dtype)), text_mask=put(batch.mask, bool), **extras
    )


def unconditional(
    condition: hunyuan_video.Condition, negative: hunyuan_video.Condition
) -> hunyuan_video.Condition:
    """The other branch of guidance: the negative prompt, and the same first frame.

    Args:
      condition: of B samples.
      negative: the one negative prompt, leaves [1, ...]; its text is as long as the samples', and
        so is its byt5, where the samples have any.
    """
    count = condition.text.shape[0]

    def broadcast(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (count, *x.shape[1:]))

    byt5 = {}
    if condition.byt5 is not None and negative.byt5 is not None:
        byt5 = {"byt5": broadcast(negative.byt5), "byt5_mask": broadcast(negative.byt5_mask)}
    elif condition.byt5 is not None:  # the negative prompt quotes nothing: all padding
        byt5 = {
            "byt5": jnp.zeros_like(condition.byt5),
            "byt5_mask": jnp.zeros_like(condition.byt5_mask),
        }
    return condition._replace(
        text=broadcast(negative.text), text_mask=broadcast(negative.text_mask), **byt5
    )
