"""What the tensors of a Wan 2.1 VAE tell of its config."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from sage_grpo_jax.weights.key_table import Shape
from sage_grpo_jax.weights.wan_vae_keys import Names

_STEP = "resample.1.weight"  # of a change of resolution, which resnets do not have


def readers(names: Names, tensors: Mapping[str, Shape]) -> dict[str, tuple[str, Callable[[], Any]]]:
    """For each field that tensors show: the tensor that does, and how to read the field off.

    Reading raises a KeyError, IndexError, ValueError or ZeroDivisionError where that tensor is
    missing or misshapen. `latents_mean`, `latents_std` and `dropout` are in no tensor.

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
        "base_dim": (entry, lambda: tensors[entry][0]),
        "decoder_base_dim": (first, decoder_base),
        "z_dim": (first, lambda: tensors[first][1]),
        "dim_mult": (conv, multiples),
        "num_res_blocks": (conv, resnets),
        "temperal_downsample": (
            step,
            lambda: tuple(_looks_back(level[-1]) for level in levels()[:-1]),
        ),
        "in_channels": (entry, lambda: tensors[entry][1]),
        "out_channels": (last, lambda: tensors[last][0]),
    }


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
