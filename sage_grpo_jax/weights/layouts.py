"""Which layouts the models have: their key tables, and whose tensors a checkpoint holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from sage_grpo_jax.models import registry
from sage_grpo_jax.weights.formats.source import Path, Shape
from sage_grpo_jax.weights.tables.key_table import Row, check_parameters
from sage_grpo_jax.weights.tables.model_tables import ModelLayout, ModelTables

Config = Any  # of one of the models in `models.registry`


class Kind(NamedTuple):
    """What tensors belong to: a model, by its name in the registry, and a layout."""

    class_name: str
    layout: str


def of(config: Config) -> ModelTables:
    """The weight tables of the model that a config belongs to.

    Raises:
      ValueError: not the config of a model.
    """
    return registry.tables_of(registry.name_of(config))


def layout_of(config: Config, layout: str) -> ModelLayout:
    """How a codebase stores the model that a config belongs to.

    Raises:
      ValueError: not the config of a model, or a layout that the model does not have.
    """
    layouts = of(config).LAYOUTS
    if layout not in layouts:
        name = registry.of(config).NAME
        raise ValueError(f"layout={layout!r}: must be one of {[*layouts]} for a {name}")
    return layouts[layout]


def parameter_shapes(config: Config) -> dict[Path, Shape]:
    """The shape of each parameter of a model, by path.

    Raises:
      ValueError: not the config of a model.
    """
    return dict(_parameter_shapes(_shape_of(config)))


def _shape_of(config: Config) -> Config:
    """The config without what no shape depends on: tracing a model takes a second."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    same = {name: fields[name].default for name in of(config).SHAPELESS}
    return dataclasses.replace(config, **same)


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config: Config) -> dict[Path, Shape]:
    model = registry.of(config)
    abstract = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract).items()}


def rows(config: Config, layout: str) -> list[Row]:
    """Key table of a model in one of its layouts."""
    return layout_of(config, layout).rows(config)


def key_table(config: Config, layout: str) -> tuple[list[Row], dict[Path, Shape]]:
    """Key table of a model in one of its layouts, and the shape of each parameter."""
    shapes = parameter_shapes(config)
    table = rows(config, layout)
    check_parameters(table, shapes)
    return table, shapes


def all_layouts() -> Iterator[tuple[Kind, ModelLayout]]:
    """The layouts of all models."""
    for class_name in registry.ENTRIES:
        for name, layout in registry.tables_of(class_name).LAYOUTS.items():
            yield Kind(class_name, name), layout


def recognise(tensors: Mapping[str, Shape]) -> Kind | None:
    """What tensors of these names belong to, or None."""
    found = [kind for kind, layout in all_layouts() if layout.mark in tensors]
    return found[0] if len(found) == 1 else None


# The names of all layouts that some model has.
NAMES = tuple(dict.fromkeys(kind.layout for kind, _ in all_layouts()))
