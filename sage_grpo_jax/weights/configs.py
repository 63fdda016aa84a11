"""config.json files of the models: diffusers' (which are also ours) and other codebases'."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models import registry
from sage_grpo_jax.weights import tables
from sage_grpo_jax.weights.tables import Config

CONFIG_FILE = "config.json"


def load_config(path: str | os.PathLike) -> Config:
    """The config of a model folder, of the folder of a weights file, or of a config file.

    Raises:
      ValueError: no readable config.json, or a model that is not ours.
    """
    path = pathlib.Path(path)
    file = path
    if path.suffix != ".json" or path.name.endswith(".index.json"):
        file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"path={path}: no {file}")
    values = checked_json.load(file)
    try:
        return _from_values(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _from_values(values: dict[str, Any]) -> Config:
    name = checked_json.typed(values.get("_class_name"), str | None, "_class_name")
    if name in registry.ENTRIES:
        return registry.named(name).Config.from_values(values)
    others = [layout.config_json for _, layout in tables.all_layouts() if layout.config_json]
    for config_json in others:
        if config_json.class_name == name:
            return config_json.read(values)
    allowed = [*registry.ENTRIES, *(config_json.class_name for config_json in others)]
    raise ValueError(f"_class_name={checked_json.shown(name)}: must be one of {allowed}")


def to_json(config: Config, layout: str) -> str:
    """The text of config.json in a layout of the model, such as "diffusers".

    Raises:
      ValueError: a layout that the model does not have, or that cannot express it.
    """
    config_json = tables.layout_of(config, layout).config_json
    if config_json is None:
        return config.to_json()
    values = {"_class_name": config_json.class_name, **config_json.write(config)}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
