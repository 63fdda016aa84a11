"""Key tables of the Wan 2.1 VAE: diffusers' `AutoencoderKLWan` and the original `Wan2.1_VAE.pth`.

The original layout: `wan/modules/vae.py` of Wan's own code. Only names differ.
"""

from __future__ import annotations

import dataclasses

from sage_grpo_jax.models.wan_vae_config import WanVaeConfig
from sage_grpo_jax.weights.key_table import Path, Row, with_bias


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
