"""Weight tables of the VAE: diffusers' `AutoencoderKLHunyuanVideo15` and Tencent's own layout.

Tencent's layout: `hyvideo/models/autoencoders/hunyuanvideo_15_vae.py`. Only names differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights.formats.source import Shape
from sage_grpo_jax.weights.tables import hunyuan_configs
from sage_grpo_jax.weights.tables.key_table import Row, with_bias
from sage_grpo_jax.weights.tables.model_tables import (
    Fact,
    ModelLayout,
    Read,
    count_layers,
    require_released,
)

SHAPELESS = ("scaling_factor", "dtype")
_RELEASED_WIDTHS = VaeConfig().block_out_channels
_RESNET = ("norm1.gamma", "norm2.gamma", "conv1.conv.weight", "conv1.conv.bias",
           "conv2.conv.weight", "conv2.conv.bias")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of modules; {l} is a level, {j} a resnet.

    Attributes:
      down, up: a level of the encoder, of the decoder.
      resnet: a resnet within a level.
      downsample, upsample: the convolution at the end of a level.
      mid: a resnet of the middle block, by index.
      attention: the attention of the middle block.
      projections: its query, key, value and output projections.
      shortcut: the convolution beside a resnet that changes the width.
    """

    down: str
    up: str
    resnet: str
    downsample: str
    upsample: str
    mid: tuple[str, str]
    attention: str
    projections: tuple[str, str, str, str]
    shortcut: str


DIFFUSERS = Names(
    down="encoder.down_blocks.{l}",
    up="decoder.up_blocks.{l}",
    resnet="resnets.{j}",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    mid=("mid_block.resnets.0", "mid_block.resnets.1"),
    attention="mid_block.attentions.0",
    projections=("to_q", "to_k", "to_v", "proj_out"),
    shortcut="conv_shortcut",
)
TENCENT = Names(
    down="encoder.down.{l}",
    up="decoder.up.{l}",
    resnet="block.{j}",
    downsample="downsample.conv",
    upsample="upsample.conv",
    mid=("mid.block_1", "mid.block_2"),
    attention="mid.attn_1",
    projections=("q", "k", "v", "proj_out"),
    shortcut="nin_shortcut",
)


def diffusers_rows(config: VaeConfig) -> list[Row]:
    """One row for each parameter of the VAE with this config."""
    return _rows(config, DIFFUSERS)


def tencent_rows(config: VaeConfig) -> list[Row]:
    """The same for Tencent's layout."""
    return _rows(config, TENCENT)


def _rows(config: VaeConfig, names: Names) -> list[Row]:
    rows = _ends("encoder", names) + _ends("decoder", names)
    for level in range(len(config.block_out_channels)):
        rows += _down_block(config, level, names) + _up_block(config, level, names)
    return rows


def _conv(ours: tuple[str, ...], theirs: str) -> list[Row]:
    return with_bias(ours, f"{theirs}.conv", "conv3d")


def _norm(ours: tuple[str, ...], theirs: str) -> list[Row]:
    return [Row((*ours, "scale"), f"{theirs}.gamma", "scale3d")]


def _ends(part: str, names: Names) -> list[Row]:
    """Rows that encoder and decoder have in common: first and last convolution, mid block."""
    mid = (part, "mid")
    rows = _conv((part, "conv_in"), f"{part}.conv_in") + _conv(
        (part, "conv_out"), f"{part}.conv_out"
    )
    rows += _norm((part, "norm_out"), f"{part}.norm_out")
    for i, theirs in enumerate(names.mid):
        rows += _resnet((*mid, f"resnet_{i}"), f"{part}.{theirs}")
    attention = f"{part}.{names.attention}"
    rows += _norm((*mid, "attention", "norm"), f"{attention}.norm")
    for ours, theirs in zip(("query", "key", "value", "out"), names.projections, strict=True):
        rows += with_bias((*mid, "attention", ours), f"{attention}.{theirs}", "pointwise3d")
    return rows


def _resnet(ours: tuple[str, ...], theirs: str, shortcut: str | None = None) -> list[Row]:
    rows = []
    for i in (1, 2):
        rows += _norm((*ours, f"norm{i}"), f"{theirs}.norm{i}")
        rows += _conv((*ours, f"conv{i}"), f"{theirs}.conv{i}")
    if shortcut is not None:
        rows += with_bias((*ours, "shortcut"), f"{theirs}.{shortcut}", "pointwise3d")
    return rows


def _down_block(config: VaeConfig, level: int, names: Names) -> list[Row]:
    ours, theirs = ("encoder", f"down_{level}"), names.down.format(l=level)
    changes = config.encoder_input_width(level) != config.block_out_channels[level]
    rows = []
    for i in range(config.layers_per_block):
        shortcut = names.shortcut if i == 0 and changes else None
        rows += _resnet((*ours, f"resnet_{i}"), f"{theirs}.{names.resnet.format(j=i)}", shortcut)
    if level < config.spatial_steps:
        rows += _conv((*ours, "downsample", "conv"), f"{theirs}.{names.downsample}")
    return rows


def _up_block(config: VaeConfig, level: int, names: Names) -> list[Row]:
    ours, theirs = ("decoder", f"up_{level}"), names.up.format(l=level)
    changes = config.decoder_input_width(level) != config.block_out_channels[::-1][level]
    rows = []
    for i in range(config.layers_per_block + 1):
        shortcut = names.shortcut if i == 0 and changes else None
        rows += _resnet((*ours, f"resnet_{i}"), f"{theirs}.{names.resnet.format(j=i)}", shortcut)
    if level < config.spatial_steps:
        rows += _conv((*ours, "upsample", "conv"), f"{theirs}.{names.upsample}")
    return rows


def _facts(names: Names, tensors: Mapping[str, Shape]) -> dict[str, Read]:
    """What tensors show of the config, by field.

    Args:
      names: of the layout.
      tensors: the shapes of all tensors of a checkpoint.
    """

    def resnets(place: str, level: str, j: str) -> list[str]:
        resnet = f"{place.format(l=level)}.{names.resnet.format(j=j)}"
        return [f"{resnet}.{part}" for part in _RESNET]

    def conv(place: str, level: int) -> str:
        return f"{place.format(l=level)}.{names.resnet.format(j=0)}.conv1.conv.weight"

    @functools.cache
    def levels() -> int:
        return count_layers(resnets(names.down, "{i}", "0"), tensors)

    def widths() -> tuple[int, ...]:
        return tuple(tensors[conv(names.down, level)][0] for level in range(levels()))

    down, up = (f"{names.down}.{names.downsample}.conv", f"{names.up}.{names.upsample}.conv")

    @functools.cache
    def steps() -> int:
        return count_layers(
            [f"{down.format(l='{i}')}.{part}" for part in ("weight", "bias")], tensors
        )

    def leaving(part: str, place: str, level: int) -> int:
        """Width behind the change of resolution of a level."""
        middle = f"{part}.{names.mid[0]}.conv1.conv.weight"
        return tensors[conv(place, level + 1) if level + 1 < levels() else middle][1]

    def temporal() -> int:
        """Steps where 2 x 2 x 2 pixels become channels instead of 2 x 2."""
        return sum(
            leaving("encoder", names.down, level) // tensors[f"{down.format(l=level)}.weight"][0]
            == 8
            for level in range(steps())
        )

    def matches(part: str, place: str, given: Callable[[], tuple[int, ...]]) -> bool:
        """Whether a change of resolution already changes the width."""
        wide = given()
        shown = [k for k in range(min(steps(), levels() - 1)) if wide[k] != wide[k + 1]]
        if not shown:
            raise ValueError("all neighbours are equally wide: nothing shows it")
        return all(leaving(part, place, k) == wide[k + 1] for k in shown)

    first, last = "decoder.conv_in.conv.weight", "decoder.conv_out.conv.weight"
    entry, downs = "encoder.conv_in.conv.weight", f"{down.format(l='*')}.weight"
    return {
        "in_channels": Read(entry, lambda: tensors[entry][1]),
        "out_channels": Read(last, lambda: tensors[last][0]),
        "latent_channels": Read(first, lambda: tensors[first][1]),
        "block_out_channels": Read(conv(names.down, 0), widths),
        "layers_per_block": Read(
            resnets(names.down, "0", "*")[2],
            lambda: count_layers(resnets(names.down, "0", "{i}"), tensors),
        ),
        "spatial_compression_ratio": Read(downs, lambda: 2 ** steps()),
        "temporal_compression_ratio": Read(downs, lambda: 2 ** temporal()),
        "downsample_match_channel": Read(downs, lambda: matches("encoder", names.down, widths)),
        "upsample_match_channel": Read(
            f"{up.format(l='*')}.weight",
            lambda: matches("decoder", names.up, lambda: widths()[::-1]),
        ),
    }


LAYOUTS = {
    "diffusers": ModelLayout(
        diffusers_rows,
        mark="encoder.down_blocks.0.resnets.0.conv1.conv.weight",
        facts=functools.partial(_facts, DIFFUSERS),
    ),
    "tencent": ModelLayout(
        tencent_rows,
        mark="encoder.down.0.block.0.conv1.conv.weight",
        facts=functools.partial(_facts, TENCENT),
        config_json=hunyuan_configs.VAE,
    ),
}


def unseen(facts: Mapping[str, Fact]) -> dict[str, Any]:
    """The scaling factor is in no tensor; it is assumed where the widths are the released ones."""
    require_released("scaling_factor", facts.get("block_out_channels"), _RELEASED_WIDTHS)
    return {}
