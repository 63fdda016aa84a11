"""Weight tables of the Wan 2.1 VAE: key tables, and what tensors tell of the config."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from sage_grpo_jax.models.wan_vae_config import WanVaeConfig
from sage_grpo_jax.weights import wan_vae_facts, wan_vae_keys
from sage_grpo_jax.weights.model_tables import Fact, ModelLayout, require_released

LAYOUTS = {
    "diffusers": ModelLayout(
        wan_vae_keys.diffusers_rows,
        mark="encoder.down_blocks.0.conv1.weight",
        facts=functools.partial(wan_vae_facts.readers, wan_vae_keys.DIFFUSERS),
    ),
    "original": ModelLayout(
        wan_vae_keys.original_rows,
        mark="encoder.downsamples.0.residual.2.weight",
        facts=functools.partial(wan_vae_facts.readers, wan_vae_keys.ORIGINAL),
    ),
}
# The units of the latents shape nothing either, but their defaults fit one number of channels only.
SHAPELESS = ("dropout", "dtype")


def unseen(facts: Mapping[str, Fact]) -> dict[str, Any]:
    """The units of the latents are in no tensor; with 16 channels they are the released ones."""
    require_released("latents_mean", facts.get("z_dim"), WanVaeConfig().z_dim)
    return {}
