"""Weight tables of the DiT: diffusers' `HunyuanVideo15Transformer3DModel` and Tencent's own layout.

Tencent's layout: `hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py`. Beside names it
differs from diffusers' in two places: the refiner's query, key and value are one tensor, and the
final modulation has shift before scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from sage_grpo_jax.models.hunyuan_video_config import HunyuanVideoConfig
from sage_grpo_jax.models.model_config import RUNTIME_FIELDS
from sage_grpo_jax.weights.formats.source import Shape
from sage_grpo_jax.weights.tables import hunyuan_configs
from sage_grpo_jax.weights.tables.key_table import Row, linear, norm, with_bias
from sage_grpo_jax.weights.tables.model_tables import (
    Fact,
    ModelLayout,
    Read,
    count_layers,
    has_part,
    require_released,
)

SHAPELESS = ("rope_theta", "target_size", "task_type", *RUNTIME_FIELDS)
# What no tensor shows, and is assumed only where the heads are the released ones.
_RELEASED_HEAD_DIM, _RELEASED_ROPE = 128, (16, 56, 56)

# Ours -> theirs within one double-stream block, per stream.
_BLOCK_DIFFUSERS = {
    "image": {
        "modulation/linear": "norm1.linear",
        "query": "attn.to_q",
        "key": "attn.to_k",
        "value": "attn.to_v",
        "proj": "attn.to_out.0",
        "mlp/in": "ff.net.0.proj",
        "mlp/out": "ff.net.2",
    },
    "text": {
        "modulation/linear": "norm1_context.linear",
        "query": "attn.add_q_proj",
        "key": "attn.add_k_proj",
        "value": "attn.add_v_proj",
        "proj": "attn.to_add_out",
        "mlp/in": "ff_context.net.0.proj",
        "mlp/out": "ff_context.net.2",
    },
}
_BLOCK_NORMS_DIFFUSERS = {
    "image": {"query_norm": "attn.norm_q", "key_norm": "attn.norm_k"},
    "text": {"query_norm": "attn.norm_added_q", "key_norm": "attn.norm_added_k"},
}
_BLOCK_TENCENT = {
    stream: {
        "modulation/linear": f"{short}_mod.linear",
        "query": f"{short}_attn_q",
        "key": f"{short}_attn_k",
        "value": f"{short}_attn_v",
        "proj": f"{short}_attn_proj",
        "mlp/in": f"{short}_mlp.fc1",
        "mlp/out": f"{short}_mlp.fc2",
    }
    for stream, short in (("image", "img"), ("text", "txt"))
}
_BLOCK_NORMS_TENCENT = {
    stream: {"query_norm": f"{short}_attn_q_norm", "key_norm": f"{short}_attn_k_norm"}
    for stream, short in (("image", "img"), ("text", "txt"))
}
_REFINER_BLOCK_DIFFUSERS = {
    "query": "attn.to_q",
    "key": "attn.to_k",
    "value": "attn.to_v",
    "proj": "attn.to_out.0",
    "mlp/in": "ff.net.0.proj",
    "mlp/out": "ff.net.2",
    "gates/linear": "norm_out.linear",
}
_REFINER_BLOCK_TENCENT = {
    "proj": "self_attn_proj",
    "mlp/in": "mlp.fc1",
    "mlp/out": "mlp.fc2",
    "gates/linear": "adaLN_modulation.1",
}


def diffusers_rows(config: HunyuanVideoConfig) -> list[Row]:
    """One row per parameter of `models.hunyuan_video.init_params(config)`."""
    # Embeddings
    rows = with_bias(("patch_embed",), "x_embedder.proj", "conv3d")
    rows += _two_layers(("time_embed",), "time_embed.timestep_embedder")
    if config.use_meanflow:
        rows += _two_layers(("time_embed_r",), "time_embed.timestep_embedder_r")
    rows.append(Row(("cond_type_embed",), "cond_type_embed.weight", "embedding"))
    rows += _diffusers_refiner_rows(config.num_refiner_layers)
    if config.text_embed_2_dim is not None:
        rows += norm(("byt5_embed", "norm"), "context_embedder_2.norm")
        for i, ours in enumerate(("in", "mid", "out"), start=1):
            rows += linear(("byt5_embed", ours), f"context_embedder_2.linear_{i}")
    if config.image_embed_dim is not None:
        rows += _two_layers(("image_embed",), "image_embedder")
        for name in ("norm_in", "norm_out"):
            rows += norm(("image_embed", name), f"image_embedder.{name}")

    # The blocks, and behind them
    rows += _block_rows(
        "transformer_blocks.{i}", _BLOCK_DIFFUSERS, _BLOCK_NORMS_DIFFUSERS, config.num_layers
    )
    rows += linear(("final", "modulation", "linear"), "norm_out.linear")
    rows += linear(("final", "proj"), "proj_out")
    return rows


def tencent_rows(config: HunyuanVideoConfig) -> list[Row]:
    """The same for Tencent's layout."""
    # Embeddings
    rows = with_bias(("patch_embed",), "img_in.proj", "conv3d")
    rows += _two_layers(("time_embed",), "time_in", ("mlp.0", "mlp.2"))
    if config.use_meanflow:
        rows += _two_layers(("time_embed_r",), "time_r_in", ("mlp.0", "mlp.2"))
    rows.append(Row(("cond_type_embed",), "cond_type_embedding.weight", "embedding"))
    rows += _tencent_refiner_rows(config.num_refiner_layers)
    if config.text_embed_2_dim is not None:
        rows += norm(("byt5_embed", "norm"), "byt5_in.layernorm")
        for i, ours in enumerate(("in", "mid", "out"), start=1):
            rows += linear(("byt5_embed", ours), f"byt5_in.fc{i}")
    if config.image_embed_dim is not None:
        rows += norm(("image_embed", "norm_in"), "vision_in.proj.0")
        rows += _two_layers(("image_embed",), "vision_in", ("proj.1", "proj.3"))
        rows += norm(("image_embed", "norm_out"), "vision_in.proj.4")

    # The blocks, and behind them
    rows += _block_rows(
        "double_blocks.{i}", _BLOCK_TENCENT, _BLOCK_NORMS_TENCENT, config.num_layers
    )
    final, theirs = ("final", "modulation", "linear"), "final_layer.adaLN_modulation.1"
    rows.append(Row((*final, "kernel"), f"{theirs}.weight", "linear", swapped=True))
    rows.append(Row((*final, "bias"), f"{theirs}.bias", "vector", swapped=True))
    rows += linear(("final", "proj"), "final_layer.linear")
    return rows


def _diffusers_refiner_rows(num_layers: int) -> list[Row]:
    rows = linear(("text_refiner", "proj_in"), "context_embedder.proj_in")
    embed = "context_embedder.time_text_embed"
    rows += _two_layers(("text_refiner", "time_embed"), f"{embed}.timestep_embedder")
    rows += _two_layers(("text_refiner", "pooled_embed"), f"{embed}.text_embedder")
    theirs = "context_embedder.token_refiner.refiner_blocks.{i}"
    return rows + _refiner_block_rows(theirs, _REFINER_BLOCK_DIFFUSERS, num_layers)


def _tencent_refiner_rows(num_layers: int) -> list[Row]:
    rows = linear(("text_refiner", "proj_in"), "txt_in.input_embedder")
    rows += _two_layers(("text_refiner", "time_embed"), "txt_in.t_embedder", ("mlp.0", "mlp.2"))
    rows += _two_layers(("text_refiner", "pooled_embed"), "txt_in.c_embedder")
    theirs = "txt_in.individual_token_refiner.blocks.{i}"
    rows += _refiner_block_rows(theirs, _REFINER_BLOCK_TENCENT, num_layers)
    fused = f"{theirs}.self_attn_qkv"
    for k, name in enumerate(("query", "key", "value")):
        ours, part = ("text_refiner", "blocks", name), (k, 3)
        rows.append(Row((*ours, "kernel"), f"{fused}.weight", "linear", num_layers, part))
        rows.append(Row((*ours, "bias"), f"{fused}.bias", "vector", num_layers, part))
    return rows


def _refiner_block_rows(theirs: str, layers: dict[str, str], num_layers: int) -> list[Row]:
    rows, ours = [], ("text_refiner", "blocks")
    for name in ("norm1", "norm2"):
        rows += norm((*ours, name), f"{theirs}.{name}", num_layers)
    for name, other in layers.items():
        rows += linear((*ours, *name.split("/")), f"{theirs}.{other}", num_layers)
    return rows


def _block_rows(
    theirs: str,
    layers: dict[str, dict[str, str]],
    norms: dict[str, dict[str, str]],
    num_layers: int,
) -> list[Row]:
    rows = []
    for stream in layers:
        for name, other in layers[stream].items():
            ours = ("blocks", stream, *name.split("/"))
            rows += linear(ours, f"{theirs}.{other}", num_layers)
        for name, other in norms[stream].items():
            ours = ("blocks", stream, name, "scale")
            rows.append(Row(ours, f"{theirs}.{other}.weight", "vector", num_layers))
    return rows


def _two_layers(
    ours: tuple[str, ...], theirs: str, names: tuple[str, str] = ("linear_1", "linear_2")
) -> list[Row]:
    return linear((*ours, "in"), f"{theirs}.{names[0]}") + linear(
        (*ours, "out"), f"{theirs}.{names[1]}"
    )


def _facts(
    table: Callable[[HunyuanVideoConfig], list[Row]], tensors: Mapping[str, Shape]
) -> dict[str, Read]:
    """What tensors show of the config, by field.

    Args:
      table: the key table of their layout.
      tensors: the shapes of all tensors of a checkpoint.
    """
    rows = table(HunyuanVideoConfig(num_layers=1, num_refiner_layers=1, use_meanflow=True))
    templates = {row.ours: row.theirs for row in rows}

    def name(*path: str) -> str:
        return templates[path].format(i=0)

    def below(*path: str) -> list[str]:
        return [row.theirs for row in rows if row.ours[: len(path)] == path]

    def layers(*path: str) -> Read:
        tensor = below(*path)[0].format(i="*")
        return Read(tensor, lambda: count_layers(below(*path), tensors))

    def width(*path: str) -> Read:
        """Of the input of a part that a model may lack."""
        scale = name(*path)
        there = functools.partial(has_part, below(path[0]), tensors)
        return Read(scale, lambda: tensors[scale][0] if there() else None)

    patch, query = name("patch_embed", "kernel"), name("blocks", "image", "query_norm", "scale")
    mlp, out = name("blocks", "image", "mlp", "in", "kernel"), name("final", "proj", "kernel")
    text, meanflow = name("text_refiner", "proj_in", "kernel"), name("time_embed_r", "in", "kernel")
    return {
        "in_channels": Read(patch, lambda: tensors[patch][1]),
        "out_channels": Read(out, lambda: tensors[out][0] // math.prod(tensors[patch][2:5])),
        "attention_head_dim": Read(query, lambda: tensors[query][0]),
        "num_attention_heads": Read(patch, lambda: tensors[patch][0] // tensors[query][0]),
        "mlp_ratio": Read(mlp, lambda: tensors[mlp][0] / tensors[patch][0], _same_width),
        "patch_size": Read(patch, lambda: tensors[patch][3]),
        "patch_size_t": Read(patch, lambda: tensors[patch][2]),
        "text_embed_dim": Read(text, lambda: tensors[text][1]),
        "use_meanflow": Read(meanflow, lambda: has_part(below("time_embed_r"), tensors)),
        "text_embed_2_dim": width("byt5_embed", "norm", "scale"),
        "image_embed_dim": width("image_embed", "norm_in", "scale"),
        "num_layers": layers("blocks"),
        "num_refiner_layers": layers("text_refiner", "blocks"),
    }


def _same_width(config: HunyuanVideoConfig, ratio: float) -> bool:
    """The hidden width of an MLP is rounded down: several ratios may give the same."""
    return int(config.hidden_size * config.mlp_ratio) == int(config.hidden_size * ratio)


LAYOUTS = {
    "diffusers": ModelLayout(
        diffusers_rows,
        mark="x_embedder.proj.weight",
        facts=functools.partial(_facts, diffusers_rows),
    ),
    "tencent": ModelLayout(
        tencent_rows,
        mark="img_in.proj.weight",
        facts=functools.partial(_facts, tencent_rows),
        config_json=hunyuan_configs.TRANSFORMER,
    ),
}


def unseen(facts: Mapping[str, Fact]) -> dict[str, Any]:
    """The axes of the rotary embedding are in no tensor."""
    require_released("rope_axes_dim", facts.get("attention_head_dim"), _RELEASED_HEAD_DIM)
    return {"rope_axes_dim": _RELEASED_ROPE}
