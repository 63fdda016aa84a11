"""Weight tables of the Wan DiT: diffusers' `WanTransformer3DModel` and the official layout.

The official layout: `wan/modules/model.py`. Only names differ; its norm2 and norm3 are diffusers'
norm3 and norm2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models.model_config import RUNTIME_FIELDS, require
from sage_grpo_jax.models.wan_config import TEXT_TOKENS, VARIANTS, WanConfig
from sage_grpo_jax.weights.formats.source import Shape
from sage_grpo_jax.weights.tables.key_table import Row, linear, norm, with_bias
from sage_grpo_jax.weights.tables.model_tables import (
    ConfigJson,
    Fact,
    ModelLayout,
    Read,
    count_layers,
    has_part,
    refuse_unknown,
)

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


# The config


def _facts(
    table: Callable[[WanConfig], list[Row]], tensors: Mapping[str, Shape]
) -> dict[str, Read]:
    """What tensors show of the config, by field or property.

    Norms cover all heads together: the tensors show the width, and not what a head has of it.

    Args:
      table: the key table of their layout.
      tensors: the shapes of all tensors of a checkpoint.
    """
    rows = table(WanConfig(num_layers=1))
    templates = {row.ours: row.theirs for row in rows}

    def name(*path: str) -> str:
        return templates[path].format(i=0)

    def shape(*path: str) -> Callable[[int], Callable[[], int]]:
        return lambda axis: lambda: tensors[name(*path)][axis]

    blocks = [row.theirs for row in rows if row.ours[0] == "blocks"]
    cross_norm = [row.theirs for row in rows if row.ours[:2] == ("blocks", "cross_norm")]
    patch, out = ("patch_embed", "kernel"), ("final", "proj", "kernel")
    text, time = ("text_embed", "in", "kernel"), ("time_embed", "in", "kernel")
    mlp = ("blocks", "mlp", "in", "kernel")

    def size() -> tuple[int, int, int]:
        t, h, w = tensors[name(*patch)][2:]
        return t, h, w

    def out_channels() -> int:
        t, h, w = size()
        return tensors[name(*out)][0] // (t * h * w)

    return {
        "hidden_size": Read(name(*patch), shape(*patch)(0)),
        "in_channels": Read(name(*patch), shape(*patch)(1)),
        "patch_size": Read(name(*patch), size),
        "out_channels": Read(name(*out), out_channels),
        "text_dim": Read(name(*text), shape(*text)(1)),
        "freq_dim": Read(name(*time), shape(*time)(1)),
        "ffn_dim": Read(name(*mlp), shape(*mlp)(0)),
        "num_layers": Read(blocks[0].format(i="*"), lambda: count_layers(blocks, tensors)),
        "cross_attn_norm": Read(cross_norm[0].format(i=0), lambda: has_part(cross_norm, tensors)),
    }


def unseen(facts: Mapping[str, Fact]) -> dict[str, Any]:
    """Heads are in no tensor; they are known for the released widths."""
    heads = {config.hidden_size: config.num_attention_heads for config in VARIANTS.values()}
    fact = facts.get("hidden_size")
    if fact is None:
        return {}
    if fact.value not in heads:
        raise ValueError(
            "no config.json: num_attention_heads is not in the tensors, and known only for the "
            f"released widths {sorted(heads)}, not for {fact.value} ({fact.tensor}); give "
            "--config_json"
        )
    return {"num_attention_heads": heads[fact.value]}


# Ours -> the constructor's in the official code.
_ORIGINAL_FIELDS = {
    "hidden_size": "dim",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_attention_heads": "num_heads",
    "num_layers": "num_layers",
    "eps": "eps",
}
# What the official config.json has beside them.
_ORIGINAL_FIXED = {"model_type": "t2v", "text_len": TEXT_TOKENS}
# What it leaves out: the official code has one value for each.
_ORIGINAL_SILENT = ("patch_size", "text_dim", "cross_attn_norm", "rope_max_seq_len")


def _read_original(values: dict[str, Any]) -> WanConfig:
    for field, value in _ORIGINAL_FIXED.items():
        require(values.get(field, value) == value, field, values.get(field), value)
    refuse_unknown(values, {*_ORIGINAL_FIXED, *_ORIGINAL_FIELDS.values()})
    given = {
        ours: checked_json.member(values, theirs, float if ours == "eps" else int)
        for ours, theirs in _ORIGINAL_FIELDS.items()
    }
    width, heads = given.pop("hidden_size"), given["num_attention_heads"]
    require(heads >= 1, "num_heads", heads, "at least 1")
    require(width % heads == 0, "dim", width, f"a multiple of num_heads={heads}")
    return WanConfig(attention_head_dim=width // heads, **given)


def _write_original(config: WanConfig) -> dict[str, Any]:
    for field in _ORIGINAL_SILENT:
        value, only = getattr(config, field), getattr(WanConfig(), field)
        require(value == only, field, value, f"{only} in the official layout")
    fields = {theirs: getattr(config, ours) for ours, theirs in _ORIGINAL_FIELDS.items()}
    return {**_ORIGINAL_FIXED, **fields}


LAYOUTS = {
    "diffusers": ModelLayout(
        diffusers_rows,
        mark="condition_embedder.time_proj.weight",
        facts=functools.partial(_facts, diffusers_rows),
    ),
    "original": ModelLayout(
        original_rows,
        mark="time_projection.1.weight",
        facts=functools.partial(_facts, original_rows),
        config_json=ConfigJson("WanModel", _read_original, _write_original),
    ),
}
