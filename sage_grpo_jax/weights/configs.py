"""The config of a checkpoint: its config.json, and what the tensors tell of it.

A config.json is diffusers' (which is also ours) or another codebase's. It is checked against the
tensors field by field, before they are; a checkpoint without config.json gets its config from
them, as far as they determine one. What tensors show which field is in the weight tables of each
model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models import registry
from sage_grpo_jax.weights import layouts
from sage_grpo_jax.weights.formats.source import Shape
from sage_grpo_jax.weights.layouts import Config
from sage_grpo_jax.weights.tables.model_tables import Fact, ModelLayout, Read

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
    others = [layout.config_json for _, layout in layouts.all_layouts() if layout.config_json]
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
    config_json = layouts.layout_of(config, layout).config_json
    if config_json is None:
        return config.to_json()
    values = {"_class_name": config_json.class_name, **config_json.write(config)}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def check_config(
    config: Config, layout: str, tensors: Mapping[str, Shape], file: str = "config.json"
) -> None:
    """Checks model, layout and every field that the tensors show.

    Args:
      config: to be checked.
      layout: that the tensors should be in.
      tensors: the shapes of all tensors of a checkpoint.
      file: where the config comes from, for messages.

    Raises:
      ValueError: another model or layout, or fields that disagree, each with the tensor.
    """
    kind = layouts.recognise(tensors)
    if kind is None:
        return  # the key table will list what is missing and unexpected

    if kind.class_name != registry.name_of(config):
        raise ValueError(
            f"these are the weights of a {registry.named(kind.class_name).NAME}, {file} is that "
            f"of a {registry.of(config).NAME}"
        )
    if kind.layout != layout:
        raise ValueError(f"the tensors are in the {kind.layout} layout, not in the {layout} layout")

    # All fields that disagree are told at once: together they say which model it is.
    wrong = []
    for field, (fact, read) in _facts(layouts.layout_of(config, layout), tensors).items():
        agrees = read.agrees or (lambda config, value, f=field: getattr(config, f) == value)
        if not agrees(config, fact.value):
            found = getattr(config, field)
            wrong.append(f"{field}={found}, the tensors say {fact.value} ({fact.tensor})")
    if wrong:
        raise ValueError(f"{file} does not fit the tensors: {'; '.join(wrong)}")


def infer_config(layout: str, tensors: Mapping[str, Shape]) -> Config:
    """The config of a checkpoint without config.json.

    Args:
      layout: that the tensors should be in.
      tensors: the shapes of all tensors of a checkpoint.

    Raises:
      ValueError: not a checkpoint of ours, or a model whose config the tensors do not determine.
    """
    kind = layouts.recognise(tensors)
    if kind is None or kind.layout != layout:
        raise ValueError(
            f"no config.json, and the tensors are not those of a model in the {layout} layout; "
            f"they begin with {sorted(tensors)[:3]}"
        )

    model_tables = registry.tables_of(kind.class_name)
    found = _facts(model_tables.LAYOUTS[layout], tensors)
    facts = {field: fact for field, (fact, _) in found.items()}

    # A fact may be a property of the config, such as a width: only fields are given to it.
    config = registry.named(kind.class_name).Config
    names = {field.name for field in dataclasses.fields(config)}
    values = {field: fact.value for field, fact in facts.items() if field in names}
    # A field whose tensor is missing is that of the released model: the key table names the tensor.
    return config(**values, **model_tables.unseen(facts))


def _facts(layout: ModelLayout, tensors: Mapping[str, Shape]) -> dict[str, tuple[Fact, Read]]:
    """What the tensors show; a field whose own tensor is missing or misshapen is left out.

    The key table names those: one missing tensor must not look like a model of another depth.
    """
    facts = {}
    for field, given in layout.facts(tensors).items():
        read = Read(*given)
        with contextlib.suppress(KeyError, IndexError, ValueError, ZeroDivisionError):
            facts[field] = Fact(read.value(), read.tensor), read
    return facts
