"""What the tensors of a checkpoint tell of the model's config.

A config.json is checked against it, field by field, before the tensors are; a checkpoint without
config.json gets its config from it, as far as the tensors determine one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
        if values["attention_head_dim"] != _RELEASED_HEAD_DIM:
            _refuse("rope_axes_dim", facts["attention_head_dim"], _RELEASED_HEAD_DIM)
        values["rope_axes_dim"] = _RELEASED_ROPE
    elif values["block_out_channels"] != _RELEASED_VAE_WIDTHS:
        _refuse("scaling_factor", facts["block_out_channels"], _RELEASED_VAE_WIDTHS)
    return kind[0](**values)


def _refuse(field: str, fact: Fact, released: Any) -> None:
    raise ValueError(
        f"no config.json: {field} is not in the tensors, and known only for the released width "
        f"{released}, not for {fact.value} ({fact.tensor}); give --config_json"
    )


def _same(config: Config, field: str, value: Any) -> bool:
    if field == "mlp_ratio":  # a width, rounded down
        return int(config.hidden_size * config.mlp_ratio) == int(config.hidden_size * value)
    return getattr(config, field) == value


def _facts(model: type, layout: str, tensors: Mapping[str, Shape]) -> dict[str, Fact]:
    try:
        facts = _dit_facts if model is HunyuanVideoConfig else _vae_facts
        return facts(layout, tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"tensors missing or misshapen: {error}") from error


def _dit_facts(layout: str, tensors: Mapping[str, Shape]) -> dict[str, Fact]:
    rows, _ = tables.key_table(
        HunyuanVideoConfig(num_layers=1, num_refiner_layers=1, use_meanflow=True), layout
    )
    templates = {row.ours: row.theirs for row in rows}

    def name(*path: str) -> str:
        return templates[path].format(i=0)

    patch, query = name("patch_embed", "kernel"), name("blocks", "image", "query_norm", "scale")
    hidden, in_channels, *patches = tensors[patch]
    head_dim = tensors[query][0]
    mlp, out = name("blocks", "image", "mlp", "in", "kernel"), name("final", "proj", "kernel")
    text, meanflow = name("text_refiner", "proj_in", "kernel"), name("time_embed_r", "in", "kernel")
    out_channels = tensors[out][0] // (patches[0] * patches[1] * patches[2])
    facts = {
        "in_channels": Fact(in_channels, patch),
        "out_channels": Fact(out_channels, out),
        "attention_head_dim": Fact(head_dim, query),
        "num_attention_heads": Fact(hidden // head_dim, patch),
        "mlp_ratio": Fact(tensors[mlp][0] / hidden, mlp),
        "patch_size": Fact(patches[1], patch),
        "patch_size_t": Fact(patches[0], patch),
        "text_embed_dim": Fact(tensors[text][1], text),
        "use_meanflow": Fact(meanflow in tensors, meanflow),
    }
    for field, path in (
        ("text_embed_2_dim", ("byt5_embed", "norm", "scale")),
        ("image_embed_dim", ("image_embed", "norm_in", "scale")),
    ):
        width = tensors[name(*path)][0] if name(*path) in tensors else None
        facts[field] = Fact(width, name(*path))
    for field, path in (
        ("num_layers", ("blocks", "image", "query", "kernel")),
        ("num_refiner_layers", ("text_refiner", "blocks", "proj", "kernel")),
    ):
        facts[field] = Fact(_count(templates[path], tensors), templates[path].format(i="*"))
    return facts


def _vae_facts(layout: str, tensors: Mapping[str, Shape]) -> dict[str, Fact]:
    names = vae_keys.TENCENT if layout == "tencent" else vae_keys.DIFFUSERS

    def conv(place: str, j: int, level: int) -> str:
        return f"{place.format(l=level)}.{names.resnet.format(j=j)}.conv1.conv.weight"

    first, last = "decoder.conv_in.conv.weight", "decoder.conv_out.conv.weight"
    levels = _count(conv(names.down, 0, 0).replace(".0.", ".{i}.", 1), tensors)
    widths = tuple(tensors[conv(names.down, 0, level)][0] for level in range(levels))
    resnets = names.down.format(l=0) + "." + names.resnet.format(j="{i}") + ".conv1.conv.weight"
    down = names.down + f".{names.downsample}.conv.weight"
    up = names.up + f".{names.upsample}.conv.weight"
    steps = _count(down.format(l="{i}"), tensors)

    def leaving(part: str, place: str, level: int) -> int:
        """Width behind the change of resolution of a level."""
        follows = conv(place, 0, level + 1)
        middle = f"{part}.{names.mid[0]}.conv1.conv.weight"
        return tensors[follows if level + 1 < levels else middle][1]

    downs = [leaving("encoder", names.down, level) for level in range(steps)]
    temporal = sum(  # 2 x 2 x 2 pixels become channels instead of 2 x 2
        width // tensors[down.format(l=level)][0] == 8 for level, width in enumerate(downs)
    )
    pattern = conv(names.down, 0, 0)
    facts = {
        "in_channels": Fact(
            tensors["encoder.conv_in.conv.weight"][1], "encoder.conv_in.conv.weight"
        ),
        "out_channels": Fact(tensors[last][0], last),
        "latent_channels": Fact(tensors[first][1], first),
        "block_out_channels": Fact(widths, pattern),
        "layers_per_block": Fact(_count(resnets, tensors), resnets.format(i="*")),
        "spatial_compression_ratio": Fact(2**steps, down.format(l="*")),
        "temporal_compression_ratio": Fact(2**temporal, down.format(l="*")),
    }
    ups = [leaving("decoder", names.up, level) for level in range(min(steps, levels - 1))]
    for field, found, given, place in (
        ("downsample_match_channel", downs, widths, down),
        ("upsample_match_channel", ups, widths[::-1], up),
    ):
        # Where neighbours are equally wide, nothing shows it.
        shown = [k for k in range(min(len(found), levels - 1)) if given[k] != given[k + 1]]
        if shown:
            changes = all(found[k] == given[k + 1] for k in shown)
            facts[field] = Fact(changes, place.format(l="*"))
    return facts


def _count(template: str, tensors: Mapping[str, Shape]) -> int:
    """How many tensors have this name, for {i} = 0, 1, ... any number."""
    before, after = template.split("{i}")
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    return sum(pattern.fullmatch(name) is not None for name in tensors)
