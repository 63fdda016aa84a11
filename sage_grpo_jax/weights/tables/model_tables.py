"""What a module of weight tables has, one for each model of `models.registry`, and its tools.

Its names: `LAYOUTS`, how each codebase stores the model (`diffusers` always, and first);
`SHAPELESS`, fields of the config that no shape depends on; and `unseen`, what the config has that
no tensor shows. The functions below are for its `facts`, its `unseen` and its config.json.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sage_grpo_jax.models.model_config import require
from sage_grpo_jax.weights.formats.source import Shape
from sage_grpo_jax.weights.tables.key_table import Row


class Read(NamedTuple):
    """How a field of the config is read off the tensors.

    Attributes:
      tensor: that shows it (or would, if it were there).
      value: reads it; a KeyError, IndexError, ValueError or ZeroDivisionError where tensors are
        missing or misshapen.
      agrees: (config, value) -> whether the config has it; None: where the field is equal.
    """

    tensor: str
    value: Callable[[], Any]
    agrees: Callable[[Any, Any], bool] | None = None


class Fact(NamedTuple):
    """A field's value, and the tensor that shows it."""

    value: Any
    tensor: str


class ConfigJson(NamedTuple):
    """config.json of a codebase that has one of its own.

    Attributes:
      class_name: its `_class_name`.
      read: from its object to our config.
      write: from our config to its object; ValueError: it cannot express this model.
    """

    class_name: str
    read: Callable[[dict[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]


def _nothing(tensors: Mapping[str, Shape]) -> Mapping[str, Read]:
    return {}


class ModelLayout(NamedTuple):
    """How a codebase stores a model.

    Attributes:
      rows: config -> one row for each parameter.
      mark: a tensor that all its files of this model have, and no others.
      facts: what tensors of these names and shapes show of the config, by field or property.
      config_json: None where it is diffusers'.
    """

    rows: Callable[[Any], list[Row]]
    mark: str
    facts: Callable[[Mapping[str, Shape]], Mapping[str, Read]] = _nothing
    config_json: ConfigJson | None = None


class ModelTables(Protocol):
    """The module itself."""

    LAYOUTS: Mapping[str, ModelLayout]
    SHAPELESS: tuple[str, ...]

    def unseen(self, facts: Mapping[str, Fact]) -> dict[str, Any]:
        """Fields that no tensor shows, for a checkpoint without config.json.

        Raises:
          ValueError: they are not known for a model with these facts.
        """
        ...


def require_released(field: str, fact: Fact | None, released: Any) -> None:
    """For `unseen`: a field that is known only where another has its released value.

    Raises:
      ValueError: naming the field.
    """
    if fact is None or fact.value == released:
        return
    raise ValueError(
        f"no config.json: {field} is not in the tensors, and known only for the released width "
        f"{released}, not for {fact.value} ({fact.tensor}); give --config_json"
    )


def has_part(names: Sequence[str], tensors: Mapping[str, Shape]) -> bool:
    """Whether a part is there: at least half of its tensors are."""
    return 2 * sum(name.format(i=0) in tensors for name in names) >= len(names)


def count_layers(templates: Sequence[str], tensors: Mapping[str, Shape]) -> int:
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


def refuse_unknown(values: Mapping[str, Any], known: Collection[str]) -> None:
    """For a `ConfigJson`: fields that we do not know may change the model.

    Args:
      values: the object of a config.json; names that begin with "_" are not fields.
      known: the names of all fields.

    Raises:
      ValueError: listing the others.
    """
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    require(not unknown, "fields", unknown, f"only {sorted(known)}")
