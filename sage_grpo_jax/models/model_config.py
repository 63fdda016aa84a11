"""What the configs of all models share: how a model is run, config.json, one-line complaints."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models.attention import IMPLEMENTATIONS

# How to run a model, as against what it is: no part of config.json.
RUNTIME_FIELDS = ("dtype", "attention", "remat", "unroll")
DTYPES = ("float32", "bfloat16")
Config = TypeVar("Config")


def check_runtime(config: Any) -> None:
    """Checks the fields of RUNTIME_FIELDS that have a choice.

    Raises:
      ValueError: naming the field, its value and what is allowed.
    """
    require(config.dtype in DTYPES, "dtype", config.dtype, f"one of {DTYPES}")
    known = config.attention in IMPLEMENTATIONS
    require(known, "attention", config.attention, f"one of {IMPLEMENTATIONS}")


def from_values(
    cls: type[Config], class_name: str, values: dict[str, Any], runtime: dict[str, Any]
) -> Config:
    """A config from the object in a diffusers config.json.

    Args:
      cls: the dataclass; its fields are diffusers', and RUNTIME_FIELDS.
      class_name: diffusers' name of the model.
      values: the object; what begins with an underscore is diffusers' bookkeeping.
      runtime: values of RUNTIME_FIELDS.

    Raises:
      ValueError: another model's config, unknown fields, values that the model cannot have.
    """
    found = values.get("_class_name", class_name)
    require(found == class_name, "_class_name", found, class_name)
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    return cls(**checked_json.fields(cls, values, RUNTIME_FIELDS), **runtime)


def to_json(config: Any, class_name: str) -> str:
    """The text of a diffusers config.json; how to run the model is left out."""
    values = dataclasses.asdict(config)
    for field in RUNTIME_FIELDS:
        del values[field]
    return json.dumps({"_class_name": class_name, **values}, indent=2, sort_keys=True) + "\n"


def require(condition: bool, field: str, value: Any, allowed: Any) -> None:
    """Raises a ValueError that says the field, its value and what is allowed."""
    if not condition:
        raise ValueError(f"{field}={_short(value)}: must be {allowed}")


def require_shape(name: str, value: Any, shape: tuple[int | None, ...]) -> None:
    """Raises a ValueError where an array has another shape; None stands for any size."""
    found = tuple(value.shape)
    fits = len(found) == len(shape) and all(
        want is None or have == want for have, want in zip(found, shape, strict=True)
    )
    require(fits, f"{name}.shape", found, shape)


def _short(value: Any) -> str:
    """A text as it is, anything else as its `repr`, and neither without end."""
    if isinstance(value, str) and len(value) <= 120 and value.isprintable():
        return value
    return checked_json.shown(value)
