"""Key table of the VAE: diffusers' `AutoencoderKLHunyuanVideo15` <-> `models/vae.py`."""

from __future__ import annotations

from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights.key_table import Row, with_bias


def diffusers_rows(config: VaeConfig) -> list[Row]:
    """One row for each parameter of the VAE with this config."""
    rows = _ends("encoder") + _ends("decoder")
    for level in range(len(config.block_out_channels)):
        rows += _down_block(config, level) + _up_block(config, level)
    return rows


def _conv(ours: tuple[str, ...], theirs: str) -> list[Row]:
    return with_bias(ours, f"{theirs}.conv", "conv3d")


def _norm(ours: tuple[str, ...], theirs: str) -> list[Row]:
    return [Row((*ours, "scale"), f"{theirs}.gamma", "scale3d")]


def _ends(part: str) -> list[Row]:
    """Rows that encoder and decoder have in common: first and last convolution, mid block."""
    mid = (part, "mid")
    rows = _conv((part, "conv_in"), f"{part}.conv_in") + _conv(
        (part, "conv_out"), f"{part}.conv_out"
    )
    rows += _norm((part, "norm_out"), f"{part}.norm_out")
    for i in range(2):
        rows += _resnet((*mid, f"resnet_{i}"), f"{part}.mid_block.resnets.{i}", shortcut=False)
    attention = f"{part}.mid_block.attentions.0"
    rows += _norm((*mid, "attention", "norm"), f"{attention}.norm")
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "proj_out"}
    for ours, theirs in names.items():
        rows += with_bias((*mid, "attention", ours), f"{attention}.{theirs}", "pointwise3d")
    return rows


def _resnet(ours: tuple[str, ...], theirs: str, shortcut: bool) -> list[Row]:
    rows = []
    for i in (1, 2):
        rows += _norm((*ours, f"norm{i}"), f"{theirs}.norm{i}")
        rows += _conv((*ours, f"conv{i}"), f"{theirs}.conv{i}")
    if shortcut:
        rows += with_bias((*ours, "shortcut"), f"{theirs}.conv_shortcut", "pointwise3d")
    return rows


def _down_block(config: VaeConfig, level: int) -> list[Row]:
    ours, theirs = ("encoder", f"down_{level}"), f"encoder.down_blocks.{level}"
    entering = config.encoder_input_width(level)
    rows = []
    for i in range(config.layers_per_block):
        shortcut = i == 0 and entering != config.block_out_channels[level]
        rows += _resnet((*ours, f"resnet_{i}"), f"{theirs}.resnets.{i}", shortcut)
    if level < config.spatial_steps:
        rows += _conv((*ours, "downsample", "conv"), f"{theirs}.downsamplers.0.conv")
    return rows


def _up_block(config: VaeConfig, level: int) -> list[Row]:
    ours, theirs = ("decoder", f"up_{level}"), f"decoder.up_blocks.{level}"
    entering = config.decoder_input_width(level)
    rows = []
    for i in range(config.layers_per_block + 1):
        shortcut = i == 0 and entering != config.block_out_channels[::-1][level]
        rows += _resnet((*ours, f"resnet_{i}"), f"{theirs}.resnets.{i}", shortcut)
    if level < config.spatial_steps:
        rows += _conv((*ours, "upsample", "conv"), f"{theirs}.upsamplers.0.conv")
    return rows
