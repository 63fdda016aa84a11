"""What HunyuanVideo-1.5 is conditioned on: texts, quoted texts, and a first frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models.door import EmbeddingNeeds
from sage_grpo_jax.models.hunyuan_video_config import HunyuanVideoConfig

# The text encoder of the released weights, by its name in embedding caches; what it gives at most.
ENCODER, TEXT_TOKENS = "qwen2_5_vl", 1000


class Condition(NamedTuple):
    """What the velocity is conditioned on. Masks are True at valid tokens.

    Attributes:
      text: [B, L, text_embed_dim].
      text_mask: bool [B, L]; a sample may have no valid token.
      byt5: [B, L2, text_embed_2_dim], or None for no such tokens.
      byt5_mask: bool [B, L2]; None for all valid.
      image: [B, N, image_embed_dim] from a vision encoder, or None for no such tokens.
      image_mask: bool [B, N]; None masks the samples whose embeddings are all zero
        (text-to-video, as in diffusers, but sample by sample).
      latents: [B, T, H, W, in_channels - out_channels], channels appended to the noisy latents
        (condition latents, then their mask); None for zeros (text-to-video).
      timestep_r: float32 [B], the end of the step, for models with use_meanflow; or None.
    """

    text: jax.Array
    text_mask: jax.Array
    byt5: jax.Array | None = None
    byt5_mask: jax.Array | None = None
    image: jax.Array | None = None
    image_mask: jax.Array | None = None
    latents: jax.Array | None = None
    timestep_r: jax.Array | None = None


def make_condition(
    arrays: Mapping[str, Any], config: HunyuanVideoConfig, latent_frames: int
) -> Condition:
    """The condition of P samples from the arrays of an embedding cache, see `door.VideoModel`."""
    dtype = jnp.dtype(config.dtype)
    parts = {
        name: arrays[name].astype(bool if name.endswith("_mask") else dtype)
        for name in ("text", "text_mask", "byt5", "byt5_mask", "image", "image_mask")
        if name in arrays
    }
    if "image_latents" in arrays:
        latents = condition_latents(arrays["image_latents"], latent_frames)
        parts["latents"] = latents.astype(np.float32)
    return Condition(**parts)


def unconditional(condition: Condition, negative: Condition) -> Condition:
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


def with_step_end(
    condition: Condition, timestep_end: Callable[[], jax.Array], config: HunyuanVideoConfig
) -> Condition:
    """The condition with the end of the step, for the models that are told of it."""
    return condition._replace(timestep_r=timestep_end()) if config.use_meanflow else condition


def embedding_needs(config: HunyuanVideoConfig) -> EmbeddingNeeds:
    """What embeddings the model takes."""
    return EmbeddingNeeds(
        text=config.text_embed_dim,
        byt5=config.text_embed_2_dim,
        image=config.image_embed_dim,
        encoder=ENCODER,
        first_frame=config.task_type == "i2v",
        text_tokens=TEXT_TOKENS,
    )


def condition_latents(image_latents: np.ndarray, frames: int) -> np.ndarray:
    """What is concatenated to the noisy latents along channels.

    The same as `prepare_cond_latents_and_mask` of diffusers' image-to-video pipeline, channels
    last: the first latent frame holds the image, the others zeros; the last channel is 1 at the
    first frame and 0 after it.

    Args:
      image_latents: [P, 1, h, w, C], scaled, as in the embedding cache.
      frames: T, latent frames of the clip.

    Returns:
      [P, T, h, w, C + 1], in the type of the latents.

    Raises:
      ValueError: latents of another rank or with more than one frame; frames below 1.
    """
    if image_latents.ndim != 5 or image_latents.shape[1] != 1:
        raise ValueError(f"image_latents has shape {image_latents.shape}; allowed: [P, 1, h, w, C]")
    if frames < 1:
        raise ValueError(f"frames is {frames}; allowed: at least 1")
    prompts, _, height, width, channels = image_latents.shape
    condition = np.zeros((prompts, frames, height, width, channels + 1), image_latents.dtype)
    condition[:, :1, ..., :channels] = image_latents
    condition[:, 0, ..., channels] = 1
    return condition
