"""What Wan 2.1 is conditioned on: a text, filled up with zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models.door import EmbeddingNeeds
from sage_grpo_jax.models.model_config import require
from sage_grpo_jax.models.wan_config import TEXT_TOKENS, WanConfig

# The text encoder of the released weights, by its name in embedding caches.
ENCODER = "umt5"


class Condition(NamedTuple):
    """What the velocity is conditioned on.

    Attributes:
      text: [B, L, text_dim]. The model attends to all L tokens, empty ones too; the released
        models were trained with L = TEXT_TOKENS.
      text_mask: bool [B, L], True at the tokens of the prompt. The others count as zeros, which is
        how both pipelines fill up prompts; there is no mask in the attention.
    """

    text: jax.Array
    text_mask: jax.Array


def make_condition(arrays: Mapping[str, Any], config: WanConfig, latent_frames: int) -> Condition:
    """The condition of P samples from the arrays of an embedding cache, see `door.VideoModel`.

    Whatever the length of the arrays, the model sees TEXT_TOKENS tokens.

    Raises:
      ValueError: more tokens than the model was trained with.
    """
    text, mask = arrays["text"], arrays["text_mask"]
    length = text.shape[1]
    require(length <= TEXT_TOKENS, "text tokens", length, f"at most {TEXT_TOKENS}")
    pad = np.pad if isinstance(text, np.ndarray) else jnp.pad
    filling = (0, TEXT_TOKENS - length)
    return Condition(
        pad(text.astype(jnp.dtype(config.dtype)), ((0, 0), filling, (0, 0))),
        pad(mask.astype(bool), ((0, 0), filling)),
    )


def unconditional(condition: Condition, negative: Condition) -> Condition:
    """The other branch of guidance: the one negative prompt, for every sample."""
    return jax.tree.map(lambda x, n: jnp.broadcast_to(n, x.shape), condition, negative)


def with_step_end(
    condition: Condition, timestep_end: Callable[[], jax.Array], config: WanConfig
) -> Condition:
    """The same condition: no Wan model is told where its step ends."""
    return condition


def embedding_needs(config: WanConfig) -> EmbeddingNeeds:
    """What embeddings the model takes."""
    return EmbeddingNeeds(text=config.text_dim, encoder=ENCODER, text_tokens=TEXT_TOKENS)
