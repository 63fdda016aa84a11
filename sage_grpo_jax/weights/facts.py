"""What the tensors of a checkpoint tell of the model's config.

A config.json is checked against it, field by field, before the tensors are; a checkpoint without
config.json gets its config from it, as far as the tensors determine one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.weights import tables, vae_keys
from sage_grpo_jax.weights.key_table import Shape
from sage_grpo_jax.weights.tables import Config

# What no tensor shows, and is assumed only where the widths are the released ones.
_RELEASED_HEAD_DIM, _RELEASED_ROPE = 128, (16, 56, 56)
_RELEASED_VAE_WIDTHS = (128, 256, 512, 1024, 1024)


class Fact(NamedTuple):
    """A field's value, and the tensor that shows it (or that would, if it were there)."""

    value: Any
    tensor: str


def check_config(
    config: Config, layout: str, tensors: Mapping[str, Shape], file: str = "config.json"
) -> None:
    """Checks model, layout and every field that the tensors show.

    Raises:
      ValueError: another model or layout, or fields that disagree, each with the tensor.
    """
    kind = tables.recognise(tensors)
    if kind is not None and not isinstance(config, kind[0]):
        raise ValueError(
            f"these are the weights of a {tables.MODEL_NAMES[kind[0]]}, {file} is that of a "
            f"{tables.MODEL_NAMES[type(config)]}"
        )
    if kind is not None and kind[1] != layout:
        raise ValueError(f"the tensors are in the {kind[1]} layout, not in the {layout} layout")
    if kind is None:
        return  # the key table will list what is missing and unexpected
    wrong = [
        f"{field}={getattr(config, field)}, the tensors say {fact.value} ({fact.tensor})"
        for field, fact in _facts(kind[0], layout, tensors).items()
        if not _same(config, field, fact.value)
    ]
    if wrong:
        raise ValueError(f"{file} does not fit the tensors: {'; '.join(wrong)}")


def infer_config(layout: str, tensors: Mapping[str, Shape]) -> Config:
    """The config of a checkpoint without config.json.

    Raises:
      ValueError: not a checkpoint of ours, or a model whose config the tensors do not determine.
    """
    kind = tables.recognise(tensors)
    if kind is None or kind[1] != layout:
        raise ValueError(
            f"no config.json, and the tensors are not those of a model in the {layout} layout; "
            f"they begin with {sorted(tensors)[:3]}"
        )
    facts = _facts(kind[0], layout, tensors)
    values = {field: fact.value for field, fact in facts.items()}
    if kind[0] is HunyuanVideoConfig:
        _require_released("rope_axes_dim", facts.get("attention_head_dim"), _RELEASED_HEAD_DIM)
        values["rope_axes_dim"] = _RELEASED_ROPE
    else:
        _require_released("scaling_factor", facts.get("block_out_channels"), _RELEASED_VAE_WIDTHS)
    # A field whose tensor is missing is that of the released model: the key table names the tensor.
    return kind[0](**values)


def _require_released(field: str, fact: Fact | None, released: Any) -> None:
    if fact is None or fact.value == released:
        return
    raise ValueError(
        f"no config.json: {field} is not in the tensors, and known only for the released width "
        f"{released}, not for {fact.value} ({fact.tensor}); give --config_json"
    )


def _same(config: Config, field: str, value: Any) -> bool:
    if field == "mlp_ratio":  # a width, rounded down
        return int(config.hidden_size * config.mlp_ratio) == int(config.hidden_size * value)
    return getattr(config, field) == value


_Read = tuple[str, Callable[[], Any]]  # the tensor that shows a field, and how to read it off


def _facts(model: type, layout: str, tensors: Mapping[str, Shape]) -> dict[str, Fact]:
    """What the tensors show; a field whose own tensor is missing or misshapen is left out.

    The key table names those: one missing tensor must not look like a model of another depth.
    """
    readers = _dit_facts if model is HunyuanVideoConfig else _vae_facts
    facts = {}
    for field, (tensor, read) in readers(layout, tensors).items():
        with contextlib.suppress(KeyError, IndexError, ValueError, ZeroDivisionError):
            facts[field] = Fact(read(), tensor)
    return facts


def _dit_facts(layout: str, tensors: Mapping[str, Shape]) -> dict[str, _Read]:
    rows = tables.rows(
        HunyuanVideoConfig(num_layers=1, num_refiner_layers=1, use_meanflow=True), layout
    )
    templates = {row.ours: row.theirs for row in rows}

    def name(*path: str) -> str:
        return templates[path].format(i=0)

    def below(*path: str) -> list[str]:
        return [row.theirs for row in rows if row.ours[: len(path)] == path]

    def layers(*path: str) -> _Read:
        return below(*path)[0].format(i="*"), lambda: _count(below(*path), tensors)

    def width(*path: str) -> _Read:
        """Of the input of a part that a model may lack."""
        scale = name(*path)
        return scale, lambda: tensors[scale][0] if _has(below(path[0]), tensors) else None

    patch, query = name("patch_embed", "kernel"), name("blocks", "image", "query_norm", "scale")
    mlp, out = name("blocks", "image", "mlp", "in", "kernel"), name("final", "proj", "kernel")
    text, meanflow = name("text_refiner", "proj_in", "kernel"), name("time_embed_r", "in", "kernel")
    return {
        "in_channels": (patch, lambda: tensors[patch][1]),
        "out_channels": (out, lambda: tensors[out][0] // math.prod(tensors[patch][2:5])),
        "attention_head_dim": (query, lambda: tensors[query][0]),
        "num_attention_heads": (patch, lambda: tensors[patch][0] // tensors[query][0]),
        "mlp_ratio": (mlp, lambda: tensors[mlp][0] / tensors[patch][0]),
        "patch_size": (patch, lambda: tensors[patch][3]),
        "patch_size_t": (patch, lambda: tensors[patch][2]),
        "text_embed_dim": (text, lambda: tensors[text][1]),
        "use_meanflow": (meanflow, lambda: _has(below("time_embed_r"), tensors)),
        "text_embed_2_dim": width("byt5_embed", "norm", "scale"),
        "image_embed_dim": width("image_embed", "norm_in", "scale"),
        "num_layers": layers("blocks"),
        "num_refiner_layers": layers("text_refiner", "blocks"),
    }


_RESNET = ("norm1.gamma", "norm2.gamma", "conv1.conv.weight", "conv1.conv.bias",
           "conv2.conv.weight", "conv2.conv.bias")  # fmt: skip


def _vae_facts(layout: str, tensors: Mapping[str, Shape]) -> dict[str, _Read]:
    names = vae_keys.TENCENT if layout == "tencent" else vae_keys.DIFFUSERS

    def resnets(place: str, level: str, j: str) -> list[str]:
        resnet = f"{place.format(l=level)}.{names.resnet.format(j=j)}"
        return [f"{resnet}.{part}" for part in _RESNET]

    def conv(place: str, level: int) -> str:
        return f"{place.format(l=level)}.{names.resnet.format(j=0)}.conv1.conv.weight"

    @functools.cache
    def levels() -> int:
        return _count(resnets(names.down, "{i}", "0"), tensors)

    def widths() -> tuple[int, ...]:
        return tuple(tensors[conv(names.down, level)][0] for level in range(levels()))

    down, up = (f"{names.down}.{names.downsample}.conv", f"{names.up}.{names.upsample}.conv")

    @functools.cache
    def steps() -> int:
        return _count([f"{down.format(l='{i}')}.{part}" for part in ("weight", "bias")], tensors)

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
        "in_channels": (entry, lambda: tensors[entry][1]),
        "out_channels": (last, lambda: tensors[last][0]),
        "latent_channels": (first, lambda: tensors[first][1]),
        "block_out_channels": (conv(names.down, 0), widths),
        "layers_per_block": (
            resnets(names.down, "0", "*")[2],
            lambda: _count(resnets(names.down, "0", "{i}"), tensors),
        ),
        "spatial_compression_ratio": (downs, lambda: 2 ** steps()),
        "temporal_compression_ratio": (downs, lambda: 2 ** temporal()),
        "downsample_match_channel": (downs, lambda: matches("encoder", names.down, widths)),
        "upsample_match_channel": (
            f"{up.format(l='*')}.weight",
            lambda: matches("decoder", names.up, lambda: widths()[::-1]),
        ),
    }


def _has(names: Sequence[str], tensors: Mapping[str, Shape]) -> bool:
    """Whether a part is there: at least half of its tensors are."""
    return 2 * sum(name.format(i=0) in tensors for name in names) >= len(names)


def _count(templates: Sequence[str], tensors: Mapping[str, Shape]) -> int:
    """How many layers are there: at least half of the tensors of {i} = 0, 1, ...

    Raises:
      ValueError: layers between them are not.
    """
    before = templates[0].partition("{i}")[0]
    parts = {template.partition("{i}")[2] for template in templates}
    pattern, found = re.compile(re.escape(before) + r"(\d{1,6})(.*)"), Counter()
    for name in tensors:
        if (match := pattern.fullmatch(name)) and match[2] in parts:
            found[int(match[1])] += 1
    layers = {layer for layer, count in found.items() if 2 * count >= len(parts)}
    if layers != set(range(len(layers))):
        raise ValueError("layers are missing between others")
    return len(layers)
