"""LoRA adapters in and out: diffusers' and peft's files, and folders of ours.

In diffusers' form a folder holds pytorch_lora_weights.safetensors: for each adapted layer A
(`lora_A.weight` [r, in]) and B (`lora_B.weight` [out, r]), below "transformer."; rank and alpha are
JSON in the file's metadata. Source: `diffusers/loaders/{peft,lora_base}.py`.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from sage_grpo_jax.common import folders
from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.models import lora as lora_lib
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.lora import LoraConfig
from sage_grpo_jax.weights import (
    configs,
    orbax_io,
    safetensors_io,
    store,
    tables,
    transformer_keys,
    writing,
)
from sage_grpo_jax.weights.key_table import Path, Row, Shape
from sage_grpo_jax.weights.sources import Source, TensorSource, TreeSource, to_devices
from sage_grpo_jax.weights.stored_tensor import StoredTensor

FORMATS = ("peft", "orbax")
LORA_FILE = "lora.json"
_STEM = "pytorch_lora_weights"
_METADATA = "lora_adapter_metadata"
_PREFIX = "transformer."
_PREFIXES = (_PREFIX, "base_model.model.")  # diffusers' and peft's own
_SUFFIXES = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_ALPHA = ".alpha"
# Settings of peft under which the product is not alpha / r * B A of whole layers.
_PLAIN = ("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern",
          "layers_to_transform", "modules_to_save")  # fmt: skip


def save_adapters(
    adapters: dict[str, Any],
    path: str | os.PathLike,
    lora: LoraConfig,
    config: HunyuanVideoConfig,
    format: str = "peft",
    *,
    overwrite: bool = False,
) -> None:
    """Writes adapters as a folder, which appears whole or not at all.

    Args:
      adapters: the tree of `models.lora`.
      path: the folder. Its diffusers form is what `load_lora_adapter(path, prefix="transformer",
        use_safetensors=True)` of diffusers' transformer reads, with alpha.
      lora: their rank, alpha and targets.
      config: of the model that they belong to.
      format: "peft" (diffusers' form) or "orbax" (ours: config.json, lora.json, params/).
      overwrite: an existing folder is replaced, if it was written by us and is unchanged.

    Raises:
      ValueError: unknown format; adapters that do not fit lora and config; a folder that may not
        be replaced.
    """
    write(path, TreeSource(adapters), lora, config, format, overwrite=overwrite)


def load_adapters(
    path: str | os.PathLike, config: HunyuanVideoConfig, shardings: Any = None
) -> tuple[dict[str, Any], LoraConfig]:
    """Adapters of a folder or file that diffusers, peft or `save_adapters` wrote.

    Args:
      path: a folder, or one safetensors file.
      config: of the model that they belong to.
      shardings: tree of shardings like the adapters; None: default device.

    Returns:
      (float32 adapters, their rank, alpha and targets)

    Raises:
      ValueError: unreadable files; layers that the model has not, or that no target covers.
    """
    source, lora = open_adapters(path, config)
    return to_devices(source, shardings, np.float32), lora


def write(
    path: str | os.PathLike,
    source: Source,
    lora: LoraConfig,
    config: HunyuanVideoConfig,
    format: str,
    *,
    dtype: Any = np.float32,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """`save_adapters` from a source; see there and `writing.write_model`."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {FORMATS}")
    dtype, progress = np.dtype(dtype), progress or Progress(0, None)
    store.check_tree(source, adapter_shapes(config, lora), pathlib.Path(LORA_FILE))
    with folders.new_folder(path, f"adapters, {format}", overwrite=overwrite) as folder:
        if format == "orbax":
            (folder / configs.CONFIG_FILE).write_text(config.to_json())
            (folder / LORA_FILE).write_text(_to_json(lora))
            orbax_io.write(folder, source, dtype, progress)
            return
        rows = adapter_rows(config, lora)
        writing.write_tensors(
            folder,
            _STEM,
            rows,
            source,
            dtype,
            progress,
            metadata={_METADATA: _metadata(lora, rows)},
        )


def open_adapters(path: str | os.PathLike, config: HunyuanVideoConfig) -> tuple[Source, LoraConfig]:
    """Adapters to be read by slices, and what they are; see `load_adapters`."""
    path = pathlib.Path(path)
    if orbax_io.is_orbax(path):
        lora, _ = read_lora_json(path / LORA_FILE)
        source: Source = orbax_io.OrbaxSource(path / orbax_io.PARAMS)
        store.check_tree(source, adapter_shapes(config, lora), path / LORA_FILE)
        return source, lora
    file = _find_file(path)
    tensors, header = safetensors_io.read_file(file)
    alphas = {name: t for name, t in tensors.items() if name.endswith(_ALPHA)}
    tensors = {_plain(name): t for name, t in tensors.items() if name not in alphas}
    try:
        lora = _describe(config, tensors, alphas, _read_metadata(file, header))
        rows, shapes = adapter_rows(config, lora, prefix=""), adapter_shapes(config, lora)
        return TensorSource(rows, shapes, tensors), lora
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def adapter_shapes(config: HunyuanVideoConfig, lora: LoraConfig) -> dict[Path, Shape]:
    """The shape of each adapter, by path."""
    shapes = traverse_util.unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(shape, np.float32)
            for path, shape in tables.parameter_shapes(config).items()
        }
    )
    flat = traverse_util.flatten_dict(lora_lib.abstract_adapters(shapes, lora))
    return {path: leaf.shape for path, leaf in flat.items()}


def adapter_rows(config: HunyuanVideoConfig, lora: LoraConfig, prefix: str = _PREFIX) -> list[Row]:
    """Key table of adapters in diffusers' layout."""
    modules = _modules(config)
    return [
        Row((*path, part), f"{prefix}{modules[path]}{suffix}", "linear", config.num_layers)
        for path in lora_lib.adapted_paths(lora)
        for part, suffix in _SUFFIXES.items()
    ]


def read_lora_json(file: pathlib.Path) -> tuple[LoraConfig, str | None]:
    """(adapters' config, path of the base weights or None) of a lora.json.

    Raises:
      ValueError: not there, or not one.
    """
    try:
        values = json.loads(file.read_text())
        lora = LoraConfig(int(values["rank"]), float(values["alpha"]), tuple(values["targets"]))
        return lora, values.get("base")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no description of adapters: {error!r}") from error


def _to_json(lora: LoraConfig) -> str:
    values = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    return json.dumps(values, indent=2) + "\n"


def _modules(config: HunyuanVideoConfig) -> dict[Path, str]:
    """Names of the layers that can be adapted, with {i} for the block."""
    rows = {row.ours: row for row in transformer_keys.diffusers_rows(config)}
    every = LoraConfig(1, 1.0)
    return {
        path: rows[(*path, "kernel")].theirs.removesuffix(".weight")
        for path in lora_lib.adapted_paths(every)
    }


def _metadata(lora: LoraConfig, rows: list[Row]) -> str:
    """What diffusers builds peft's LoraConfig of."""
    suffix = _SUFFIXES["down"]
    modules = [name.removeprefix(_PREFIX).removesuffix(suffix)
               for row in rows if row.theirs.endswith(suffix) for name in row.names()]  # fmt: skip
    whole = lora.alpha == int(lora.alpha)
    values = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    return json.dumps({f"{_PREFIX}{k}": v for k, v in values.items()}, indent=2, sort_keys=True)


def _read_metadata(file: pathlib.Path, header: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings from the file's metadata, or from peft's own adapter_config.json."""
    beside = file.parent / "adapter_config.json"
    if _METADATA in header:
        text = header[_METADATA]
    elif beside.is_file():
        text = beside.read_text()
    else:
        return {}
    try:
        return {_plain(key): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: metadata of the adapters: not JSON: {error}") from error


def _describe(
    config: HunyuanVideoConfig,
    tensors: Mapping[str, StoredTensor],
    alphas: Mapping[str, StoredTensor],
    metadata: Mapping[str, Any],
) -> LoraConfig:
    """Rank, alpha and targets of a file."""
    special = {key: metadata[key] for key in _PLAIN if metadata.get(key)}
    if special:
        raise ValueError(f"settings {special}: only plain adapters of one rank are supported")
    targets = [
        target
        for target in lora_lib.TARGETS
        if any(_first_name(config, stream, target) in tensors for stream in lora_lib.STREAMS)
    ]
    ranks = {t.shape[0]: name for name, t in tensors.items()
             if name.endswith(_SUFFIXES["down"]) and t.shape}  # fmt: skip
    if not targets or not ranks:
        raise ValueError(f"no adapters of this model; tensors begin with {sorted(tensors)[:3]}")
    if len(ranks) > 1:
        raise ValueError(f"ranks differ: {', '.join(f'{n}: {r}' for r, n in ranks.items())}")
    rank = next(iter(ranks))
    if metadata.get("r", rank) != rank:
        raise ValueError(f"r={metadata['r']} in the metadata, the tensors have rank {rank}")
    found = {float(tensor.read().reshape(())): name for name, tensor in alphas.items()}
    if metadata.get("lora_alpha") is not None:
        found.setdefault(float(metadata["lora_alpha"]), "metadata")
    if len(found) > 1:
        raise ValueError(f"alphas differ: {', '.join(f'{n}: {a}' for a, n in found.items())}")
    # Without alpha diffusers takes the rank: scale 1.
    return LoraConfig(rank, next(iter(found), float(rank)), tuple(targets))


def _first_name(config: HunyuanVideoConfig, stream: str, target: str) -> str:
    module = _modules(config)[("blocks", stream, *target.split("/"))]
    return module.format(i=0) + _SUFFIXES["down"]


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _find_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    named = path / f"{_STEM}{safetensors_io.SUFFIX}"
    if named.is_file():
        return named
    found = sorted(path.glob(f"*{safetensors_io.SUFFIX}")) if path.is_dir() else []
    if len(found) != 1:
        raise ValueError(f"path={path}: must be a file of adapters, or hold {named.name}")
    return found[0]
