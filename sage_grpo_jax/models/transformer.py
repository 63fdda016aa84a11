"""What the transformers have in common: checks of their inputs, and the call into the network."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax

from sage_grpo_jax.models import lora
from sage_grpo_jax.models.door import TransformerConfig
from sage_grpo_jax.models.model_config import require, require_shape


def velocity(
    network: nn.Module,
    params: dict[str, Any],
    latents: jax.Array,
    timestep: jax.Array,
    condition: Any,
    adapters: Any = None,
    scale: float = 1.0,
) -> jax.Array:
    """What the network gives, with the adapters merged into its parameters.

    Args:
      network: called with latents, timestep, condition, the adapters of its stacked blocks (see
        `layer_stack.blocks`) or None, and their scale.
      params, latents, timestep, condition, adapters, scale: as of `door.VideoModel.velocity`.
    """
    blocks = None
    if adapters is not None:
        params, blocks = lora.split_blocks(params, adapters, scale)
    return network.apply({"params": params}, latents, timestep, condition, blocks, scale)


def check_inputs(
    latents: jax.Array,
    timestep: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    config: TransformerConfig,
    text_width: int,
) -> None:
    """Checks latents, timesteps and text against each other and the config.

    Raises:
      ValueError: in one line, the array, its shape and what is allowed.
    """
    chex.assert_rank([latents, timestep, text, text_mask], [5, 1, 3, 2])
    for size, patch, axis in zip(latents.shape[1:4], config.patch, "THW", strict=True):
        require(size % patch == 0, f"latents axis {axis}", size, f"a multiple of the patch {patch}")
    batch = latents.shape[0]
    require_shape("latents", latents, (*latents.shape[:4], config.out_channels))
    require_shape("timestep", timestep, (batch,))
    require_shape("condition.text", text, (batch, None, text_width))
    require_shape("condition.text_mask", text_mask, text.shape[:2])
