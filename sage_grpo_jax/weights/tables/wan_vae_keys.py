"""Weight tables of the Wan 2.1 VAE: diffusers' `AutoencoderKLWan` and the original layout.

The original layout: `wan/modules/vae.py` of Wan's own code, in `Wan2.1_VAE.pth`. Only names differ.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from sage_grpo_jax.models.wan_vae_config import WanVaeConfig
from sage_grpo_jax.weights.formats.source import Path, Shape
from sage_grpo_jax.weights.tables.key_table import Row, with_bias
from sage_grpo_jax.weights.tables.model_tables import Fact, ModelLayout, Read, require_released

SHAPELESS = ("dropout", "dtype")
_STEP = "resample.1.weight"  # of a change of resolution, which resnets do not have


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of modules; {l} is a level, {j} a resnet, {n} counts the modules of all levels.

    Attributes:
      down, downsample: a resnet, and the change of resolution, of an encoder level.
      up, upsample: the same of a decoder level.
      mid: first resnet, attention and second resnet of the middle block.
      conv_in, norm_out, conv_out: first convolution, last norm and last convolution.
      quant, post_quant: the convolutions between encoder, latents and decoder.
      resnet: the two norms, the two convolutions and the shortcut of a resnet.
    """

    down: str
    downsample: str
    up: str
    upsample: str
    mid: tuple[str, str, str]
    conv_in: str
    norm_out: str
    conv_out: str
    quant: str
    post_quant: str
    resnet: tuple[str, str, str, str, str]


DIFFUSERS = Names(
    down="encoder.down_blocks.{n}",
    downsample="encoder.down_blocks.{n}",
    up="decoder.up_blocks.{l}.resnets.{j}",
    upsample="decoder.up_blocks.{l}.upsamplers.0",
    mid=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    conv_in="conv_in",
    norm_out="norm_out",
    conv_out="conv_out",
    quant="quant_conv",
    post_quant="post_quant_conv",
    resnet=("norm1", "norm2", "conv1", "conv2", "conv_shortcut"),
)
ORIGINAL = Names(
    down="encoder.downsamples.{n}",
    downsample="encoder.downsamples.{n}",
    up="decoder.upsamples.{n}",
    upsample="decoder.upsamples.{n}",
    mid=("middle.0", "middle.1", "middle.2"),
    conv_in="conv1",
    norm_out="head.0",
    conv_out="head.2",
    quant="conv1",
    post_quant="conv2",
    resnet=("residual.0", "residual.3", "residual.2", "residual.6", "shortcut"),
)


def diffusers_rows(config: WanVaeConfig) -> list[Row]:
    """One row for each parameter of the VAE with this config."""
    return _rows(config, DIFFUSERS)


def original_rows(config: WanVaeConfig) -> list[Row]:
    """The same for the original layout."""
    return _rows(config, ORIGINAL)


def _rows(config: WanVaeConfig, names: Names) -> list[Row]:
    rows = with_bias(("encoder", "quant"), names.quant, "pointwise3d")
    rows += with_bias(("decoder", "post_quant"), names.post_quant, "pointwise3d")
    rows += _ends("encoder", names) + _ends("decoder", names)
    for level in range(config.levels):
        rows += _down_block(config, level, names) + _up_block(config, level, names)
    return rows


def _norm(ours: Path, theirs: str, kind: str = "scale3d") -> list[Row]:
    return [Row((*ours, "scale"), f"{theirs}.gamma", kind)]


def _ends(part: str, names: Names) -> list[Row]:
    """Rows that encoder and decoder have in common: first and last layers, middle block."""
    rows = with_bias((part, "conv_in"), f"{part}.{names.conv_in}", "conv3d")
    rows += _norm((part, "norm_out"), f"{part}.{names.norm_out}")
    rows += with_bias((part, "conv_out"), f"{part}.{names.conv_out}", "conv3d")
    before, attention, after = (f"{part}.{name}" for name in names.mid)
    rows += _resnet((part, "mid", "resnet_0"), before, names)
    rows += _resnet((part, "mid", "resnet_1"), after, names)
    return rows + _attention((part, "mid", "attention"), attention)


def _attention(ours: Path, theirs: str) -> list[Row]:
    rows = _norm((*ours, "norm"), f"{theirs}.norm", "scale2d")
    for k, name in enumerate(("query", "key", "value")):
        weight, bias = f"{theirs}.to_qkv.weight", f"{theirs}.to_qkv.bias"
        rows.append(Row((*ours, name, "kernel"), weight, "pointwise2d", part=(k, 3)))
        rows.append(Row((*ours, name, "bias"), bias, "vector", part=(k, 3)))
    return rows + with_bias((*ours, "out"), f"{theirs}.proj", "pointwise2d")


def _resnet(ours: Path, theirs: str, names: Names, shortcut: bool = False) -> list[Row]:
    *layers, projection = (f"{theirs}.{name}" for name in names.resnet)
    rows = _norm((*ours, "norm1"), layers[0]) + _norm((*ours, "norm2"), layers[1])
    rows += with_bias((*ours, "conv1"), layers[2], "conv3d")
    rows += with_bias((*ours, "conv2"), layers[3], "conv3d")
    if shortcut:
        rows += with_bias((*ours, "shortcut"), projection, "pointwise3d")
    return rows


def _down_block(config: WanVaeConfig, level: int, names: Names) -> list[Row]:
    ours, first = ("encoder", f"down_{level}"), level * (config.num_res_blocks + 1)
    changes = config.encoder_input_width(level) != config.encoder_width(level)
    rows = []
    for i in range(config.num_res_blocks):
        theirs = names.down.format(l=level, j=i, n=first + i)
        rows += _resnet((*ours, f"resnet_{i}"), theirs, names, changes and i == 0)
    if level == config.levels - 1:
        return rows
    theirs = names.downsample.format(l=level, n=first + config.num_res_blocks)
    return rows + _resample((*ours, "downsample"), theirs, config.downsamples_time(level))


def _up_block(config: WanVaeConfig, level: int, names: Names) -> list[Row]:
    ours, first = ("decoder", f"up_{level}"), level * (config.num_res_blocks + 2)
    changes = config.decoder_input_width(level) != config.decoder_width(level)
    rows = []
    for i in range(config.num_res_blocks + 1):
        theirs = names.up.format(l=level, j=i, n=first + i)
        rows += _resnet((*ours, f"resnet_{i}"), theirs, names, changes and i == 0)
    if level == config.levels - 1:
        return rows
    theirs = names.upsample.format(l=level, n=first + config.num_res_blocks + 1)
    return rows + _resample((*ours, "upsample"), theirs, config.upsamples_time(level))


def _resample(ours: Path, theirs: str, temporal: bool) -> list[Row]:
    rows = with_bias((*ours, "conv"), f"{theirs}.resample.1", "conv2d")
    if temporal:
        rows += with_bias((*ours, "time_conv"), f"{theirs}.time_conv", "conv3d")
    return rows


def facts(names: Names, tensors: Mapping[str, Shape]) -> dict[str, Read]:
    """What tensors show of the config, by field.

    Args:
      names: of the layout.
      tensors: the shapes of all tensors of a checkpoint in this layout.
    """
    entry, last = f"encoder.{names.conv_in}.weight", f"decoder.{names.conv_out}.weight"
    first = f"decoder.{names.conv_in}.weight"
    conv, step = (f"{names.down.format(n='*')}.{tensor}" for tensor in (_conv(names), _STEP))

    @functools.cache
    def levels() -> list[list[Mapping[str, Shape]]]:
        return _levels(names, tensors)

    def multiples() -> tuple[int, ...]:
        return tuple(level[0][_conv(names)][0] // tensors[entry][0] for level in levels())

    def resnets() -> int:
        *others, deepest = levels()
        (count,) = {len(level) - 1 for level in others} | {len(deepest)}
        return count

    def decoder_base() -> int | None:
        base = tensors[first][0] // multiples()[-1]
        return None if base == tensors[entry][0] else base

    return {
        "base_dim": Read(entry, lambda: tensors[entry][0]),
        "decoder_base_dim": Read(first, decoder_base, _same_decoder_base),
        "z_dim": Read(first, lambda: tensors[first][1]),
        "dim_mult": Read(conv, multiples),
        "num_res_blocks": Read(conv, resnets),
        "temperal_downsample": Read(
            step, lambda: tuple(_looks_back(level[-1]) for level in levels()[:-1])
        ),
        "in_channels": Read(entry, lambda: tensors[entry][1]),
        "out_channels": Read(last, lambda: tensors[last][0]),
    }


def _same_decoder_base(config: WanVaeConfig, base: int | None) -> bool:
    """None says the same as the width of the encoder."""
    return (config.decoder_base_dim or config.base_dim) == (base or config.base_dim)


def _conv(names: Names) -> str:
    return f"{names.resnet[2]}.weight"


def _levels(names: Names, tensors: Mapping[str, Shape]) -> list[list[Mapping[str, Shape]]]:
    """The tensors of each module of each encoder level.

    Raises:
      ValueError: modules are missing between others.
    """
    before, after = map(re.escape, names.down.split("{n}"))
    pattern, modules = re.compile(rf"{before}(\d{{1,6}}){after}\.(.*)"), defaultdict(dict)
    for name, shape in tensors.items():
        if match := pattern.fullmatch(name):
            modules[int(match[1])][match[2]] = shape
    if set(modules) != set(range(len(modules))):
        raise ValueError("modules are missing between others")
    levels = [[]]
    for n in range(len(modules)):
        levels[-1].append(modules[n])
        if any(tensor.startswith("resample.") for tensor in modules[n]):
            levels.append([])
    return levels


def _looks_back(module: Mapping[str, Shape]) -> bool:
    return any(tensor.startswith("time_conv.") for tensor in module)


LAYOUTS = {
    "diffusers": ModelLayout(
        diffusers_rows,
        mark="post_quant_conv.weight",
        facts=functools.partial(facts, DIFFUSERS),
    ),
    "original": ModelLayout(
        original_rows,
        mark="decoder.head.0.gamma",
        facts=functools.partial(facts, ORIGINAL),
    ),
}


def unseen(facts: Mapping[str, Fact]) -> dict[str, Any]:
    """The units of the latents are in no tensor; they are assumed for the released widths."""
    released = WanVaeConfig()
    for field in ("base_dim", "z_dim"):
        require_released("latents_mean", facts.get(field), getattr(released, field))
    return {}
