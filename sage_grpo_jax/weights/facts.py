"""What the tensors of a checkpoint tell of the model's config.

A config.json is checked against it, field by field, before the tensors are; a checkpoint without
config.json gets its config from it, as far as the tensors determine one. What tensors show which
field is in the weight tables of each model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

from sage_grpo_jax.models import registry
from sage_grpo_jax.weights import tables
from sage_grpo_jax.weights.key_table import Shape
from sage_grpo_jax.weights.model_tables import Fact, ModelLayout, Read
from sage_grpo_jax.weights.tables import Config


def check_config(
    config: Config, layout: str, tensors: Mapping[str, Shape], file: str = "config.json"
) -> None:
    """Checks model, layout and every field that the tensors show.

    Raises:
      ValueError: another model or layout, or fields that disagree, each with the tensor.
    """
    kind = tables.recognise(tensors)
    if kind is None:
        return  # the key table will list what is missing and unexpected
    if kind.class_name != registry.name_of(config):
        raise ValueError(
            f"these are the weights of a {registry.named(kind.class_name).NAME}, {file} is that "
            f"of a {registry.of(config).NAME}"
        )
    if kind.layout != layout:
        raise ValueError(f"the tensors are in the {kind.layout} layout, not in the {layout} layout")
    wrong = []
    for field, (fact, read) in _facts(tables.layout_of(config, layout), tensors).items():
        agrees = read.agrees or (lambda config, value, f=field: getattr(config, f) == value)
        if not agrees(config, fact.value):
            found = getattr(config, field)
            wrong.append(f"{field}={found}, the tensors say {fact.value} ({fact.tensor})")
    if wrong:
        raise ValueError(f"{file} does not fit the tensors: {'; '.join(wrong)}")


def infer_config(layout: str, tensors: Mapping[str, Shape]) -> Config:
    """The config of a checkpoint without config.json.

    Raises:
      ValueError: not a checkpoint of ours, or a model whose config the tensors do not determine.
    """
    kind = tables.recognise(tensors)
    if kind is None or kind.layout != layout:
        raise ValueError(
            f"no config.json, and the tensors are not those of a model in the {layout} layout; "
            f"they begin with {sorted(tensors)[:3]}"
        )
    model_tables = registry.tables_of(kind.class_name)
    found = _facts(model_tables.LAYOUTS[layout], tensors)
    facts = {field: fact for field, (fact, _) in found.items()}
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
