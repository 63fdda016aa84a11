"""LoRA adapters in and out: diffusers' and peft's files (`adapter_files`), and folders of ours.

We write diffusers' form: a folder with pytorch_lora_weights.safetensors.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging

from sage_grpo_jax.common import checked_json, folders
from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.models import lora as lora_lib
from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import TransformerConfig
from sage_grpo_jax.models.lora import LoraConfig
from sage_grpo_jax.weights import adapter_files, configs, store
from sage_grpo_jax.weights.adapter_files import Opened, adapter_shapes
from sage_grpo_jax.weights.formats import orbax_io
from sage_grpo_jax.weights.formats.source import Source
from sage_grpo_jax.weights.sources import FiniteSource, TreeSource, to_devices
from sage_grpo_jax.weights.tables.key_table import Row

FORMATS = ("peft", "orbax")
LORA_FILE = "lora.json"
_SUFFIXES = {"down": ".lora_A.weight", "up": ".lora_B.weight"}


def save_adapters(
    adapters: dict[str, Any],
    path: str | os.PathLike,
    lora: LoraConfig,
    config: TransformerConfig,
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
    path: str | os.PathLike, config: TransformerConfig, shardings: Any = None
) -> tuple[dict[str, Any], LoraConfig]:
    """Adapters of a folder or file that diffusers, peft or `save_adapters` wrote.

    They may be of any dense layers of the model, of some blocks only, of different ranks: what the
    file has not is zero, and a warning names it.

    Args:
      path: a folder, or one file.
      config: of the model that they belong to.
      shardings: tree of shardings like the adapters; None: default device.

    Returns:
      (float32 adapters, their rank, alpha and targets)

    Raises:
      ValueError: unreadable files; layers that the model has not; values that are not finite.
    """
    opened = open_adapters(path, config)
    if opened.untrained and jax.process_index() == 0:
        logging.warning("%s", describe_untrained(path, opened))
    source = FiniteSource(opened.source, f"adapters {path}")
    return to_devices(source, shardings, np.float32), opened.lora


def describe_untrained(path: str | os.PathLike, opened: Opened) -> str:
    """A line about what adapters leave as it is in the base."""
    return f"the adapters {path} do not train: {opened.untrained}"


def write(
    path: str | os.PathLike,
    source: Source,
    lora: LoraConfig,
    config: TransformerConfig,
    format: str,
    *,
    dtype: Any = np.float32,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """`save_adapters` from a source; see there and `store.write_model`."""
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

        # diffusers looks for rank and alpha in the metadata of the tensors' file.
        rows = adapter_rows(config, lora)
        store.write_tensors(
            folder,
            adapter_files.STEM,
            rows,
            source,
            dtype,
            progress,
            metadata={adapter_files.METADATA: _metadata(lora, rows)},
        )


def open_adapters(path: str | os.PathLike, config: TransformerConfig) -> Opened:
    """Adapters to be read by slices, and what they are; see `load_adapters`."""
    path = pathlib.Path(path)
    if not orbax_io.is_orbax(path):
        return adapter_files.open_file(path, config)
    lora, _ = read_lora_json(path / LORA_FILE)
    source = orbax_io.OrbaxSource(path / orbax_io.PARAMS)
    store.check_tree(source, adapter_shapes(config, lora), path / LORA_FILE)
    return Opened(source, lora, "")


def adapter_rows(config: TransformerConfig, lora: LoraConfig) -> list[Row]:
    """Key table of adapters in diffusers' layout."""
    rows = adapter_files.module_rows(config)
    return [
        Row(
            (*path, part),
            f"{adapter_files.PREFIX}{adapter_files.module_name(rows[path])}{suffix}",
            "linear",
            rows[path].stacked,
        )
        for path in lora_lib.adapted_paths(lora, registry.of(config))
        for part, suffix in _SUFFIXES.items()
    ]


def read_lora_json(file: pathlib.Path) -> tuple[LoraConfig, str | None]:
    """(adapters' config, path of the base weights or None) of a lora.json.

    Raises:
      ValueError: not there, or not one.
    """
    values = checked_json.load(file)
    try:
        rank = checked_json.member(values, "rank", int)
        alpha = checked_json.member(values, "alpha", float)
        targets = checked_json.member(values, "targets", list[str])
        base = checked_json.typed(values.get("base"), str | None, "base")
        return LoraConfig(rank, float(alpha), tuple(targets)), base
    except ValueError as error:
        raise ValueError(f"{file}: no description of adapters: {error}") from error


def _to_json(lora: LoraConfig) -> str:
    values = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    return json.dumps(values, indent=2) + "\n"


def _metadata(lora: LoraConfig, rows: list[Row]) -> str:
    """What diffusers builds peft's LoraConfig of."""
    prefix, suffix = adapter_files.PREFIX, _SUFFIXES["down"]
    modules = [name.removeprefix(prefix).removesuffix(suffix)
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
    return json.dumps({f"{prefix}{k}": v for k, v in values.items()}, indent=2, sort_keys=True)
