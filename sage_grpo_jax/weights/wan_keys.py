"""Key tables of the Wan DiT: diffusers' `WanTransformer3DModel` and the official layout.

The official layout: `wan/modules/model.py`. Only names differ; its norm2 and norm3 are diffusers'
norm3 and norm2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sage_grpo_jax.models.model_config import RUNTIME_FIELDS
from sage_grpo_jax.models.wan_config import WanConfig
from sage_grpo_jax.weights.key_table import Row, linear, norm, with_bias
from sage_grpo_jax.weights.model_tables import Fact, ModelLayout

SHAPELESS = ("eps", "rope_max_seq_len", *RUNTIME_FIELDS)

# Ours -> theirs. In the blocks, "{i}" is the number of the block.
_OUTER_DIFFUSERS = {
    "time_embed/in": "condition_embedder.time_embedder.linear_1",
    "time_embed/out": "condition_embedder.time_embedder.linear_2",
    "time_proj/linear": "condition_embedder.time_proj",
    "text_embed/in": "condition_embedder.text_embedder.linear_1",
    "text_embed/out": "condition_embedder.text_embedder.linear_2",
    "final/proj": "proj_out",
}
_OUTER_ORIGINAL = {
    "time_embed/in": "time_embedding.0",
    "time_embed/out": "time_embedding.2",
    "time_proj/linear": "time_projection.1",
    "text_embed/in": "text_embedding.0",
    "text_embed/out": "text_embedding.2",
    "final/proj": "head.head",
}
_ATTENTION_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj": "to_out.0"}
_ATTENTION_ORIGINAL = {"query": "q", "key": "k", "value": "v", "proj": "o"}


def diffusers_rows(config: WanConfig) -> list[Row]:
    """One row per parameter of `models.wan.init_params(config)`."""
    return _rows(
        config,
        _OUTER_DIFFUSERS,
        attentions={"self_attention": "attn1", "cross_attention": "attn2"},
        attention_layers=_ATTENTION_DIFFUSERS,
        mlp={"in": "ffn.net.0.proj", "out": "ffn.net.2"},
        cross_norm="norm2",
        tables=("scale_shift_table", "scale_shift_table"),
    )


def original_rows(config: WanConfig) -> list[Row]:
    """The same for the official layout."""
    return _rows(
        config,
        _OUTER_ORIGINAL,
        attentions={"self_attention": "self_attn", "cross_attention": "cross_attn"},
        attention_layers=_ATTENTION_ORIGINAL,
        mlp={"in": "ffn.0", "out": "ffn.2"},
        cross_norm="norm3",
        tables=("modulation", "head.modulation"),
    )


def _rows(
    config: WanConfig,
    outer: Mapping[str, str],
    *,
    attentions: Mapping[str, str],
    attention_layers: Mapping[str, str],
    mlp: Mapping[str, str],
    cross_norm: str,
    tables: tuple[str, str],
) -> list[Row]:
    """Rows of a layout by its names; `tables`: of the modulation in a block, and at the end."""
    block, layers = "blocks.{i}", config.num_layers

    # Around the blocks
    rows = with_bias(("patch_embed",), "patch_embedding", "conv3d")
    for ours, theirs in outer.items():
        rows += linear(tuple(ours.split("/")), theirs)
    rows.append(Row(("final", "modulation", "table"), tables[1], "table"))

    # The blocks
    ours = ("blocks", "modulation", "table")
    rows.append(Row(ours, f"{block}.{tables[0]}", "table", layers))
    for attention, prefix in attentions.items():
        for name, theirs in attention_layers.items():
            rows += linear(("blocks", attention, name), f"{block}.{prefix}.{theirs}", layers)
        for name, theirs in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            ours = ("blocks", attention, name, "scale")
            rows.append(Row(ours, f"{block}.{prefix}.{theirs}.weight", "vector", layers))
    if config.cross_attn_norm:
        rows += norm(("blocks", "cross_norm"), f"{block}.{cross_norm}", layers)
    for name, theirs in mlp.items():
        rows += linear(("blocks", "mlp", name), f"{block}.{theirs}", layers)
    return rows


LAYOUTS = {
    "diffusers": ModelLayout(diffusers_rows, mark="condition_embedder.time_proj.weight"),
    "original": ModelLayout(original_rows, mark="time_projection.1.weight"),
}


def unseen(facts: Mapping[str, Fact]) -> dict[str, Any]:
    """Nothing is read off the tensors: a checkpoint needs its config.json."""
    raise ValueError("no config.json: a Wan 2.1 DiT is not told by its tensors; give --config_json")
