"""What a field of a dataclass may hold, said beside the field; one checker and one builder for all.

    @dataclasses.dataclass(frozen=True)
    class Optimizer:
        name: str = fields.choice("adamw", ("adamw", "muon"))
        learning_rate: float = fields.bounded(1e-5, above=0)
        b1: float = fields.bounded(0.9, least=0, below=1)
        label: str = fields.free("", "a comment in the log")
        nesterov: bool = False

`build` makes such a dataclass, and those within it, from nested mappings, and `check` looks at one
that is there. What two fields ask of each other stays with the class: its `__post_init__` calls
`require`. Every error is one line: the field's path, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.common.frozen_dict import FrozenDict

T = TypeVar("T")
_REQUIRED = dataclasses.MISSING  # a field without a default
_MAX_INTEGER = 1 << 63  # of numpy and JAX


class FieldError(ValueError):
    """One field that holds what it may not; as text "config.seed: got -1; allowed: at least 0".

    Args:
      prefix: what stands before the name of the field: "config.rollout.", "--", "Motion.".
      field: name of the field.
      value: what it holds.
      allowed: what it may hold.
    """

    def __init__(self, prefix: str, field: str, value: Any, allowed: str) -> None:
        super().__init__(prefix, field, value, allowed)
        self.prefix, self.field, self.value, self.allowed = prefix, field, value, allowed

    def __str__(self) -> str:
        got = checked_json.shown(self.value)
        return f"{self.prefix}{self.field}: got {got}; allowed: {self.allowed}"


# What a field may hold


class Rule(Protocol):
    """What a field of the right type may hold."""

    @property
    def allowed(self) -> str:
        """The rule in words, for the message."""

    def admits(self, value: Any) -> bool:
        """Whether a value of the field's type may stand there."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Finite numbers within bounds, which are part of the range (least, most) or not."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    @property
    def allowed(self) -> str:
        low = self.above if self.least is None else self.least
        high = self.below if self.most is None else self.most
        if low is None and high is None:
            return "finite"
        if high is None:
            return f"at least {low}" if self.above is None else f"greater than {low} and finite"
        if low is None:
            return f"at most {high}" if self.below is None else f"below {high} and finite"
        open_ends = [f"greater than {low}"] * (self.above is not None)
        open_ends += [f"below {high}"] * (self.below is not None)
        return f"{low} to {high}" + (f", but {' and '.join(open_ends)}" if open_ends else "")

    def admits(self, value: float) -> bool:
        # Written so that NaN and infinity fail.
        return (
            -math.inf < value < math.inf
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of some texts; where they are known late only, by what returns them."""

    source: Iterable[str] | Callable[[], Iterable[str]]

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.source() if callable(self.source) else self.source)

    @property
    def allowed(self) -> str:
        named = ", ".join(value for value in self.values if value)
        return f"{named}, or ''" if "" in self.values else named

    def admits(self, value: str) -> bool:
        return value in self.values


@dataclasses.dataclass(frozen=True)
class NotEmpty:
    """Any text but the empty one."""

    allowed: str

    def admits(self, value: str) -> bool:
        return bool(value)


@dataclasses.dataclass(frozen=True)
class Free:
    """Anything of the field's type, for a reason."""

    reason: str
    allowed: str = "anything"

    def admits(self, value: Any) -> bool:
        return True


def bounded(
    default: Any = _REQUIRED,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    unless: str = "",
) -> Any:
    """A field of finite numbers: one, each of a tuple, or each value of a mapping.

    Args:
      default: of the field; without it the field has to be given.
      least: the lowest number.
      above: number that all must exceed, in place of `least`.
      most: the highest number.
      below: number that none may reach, in place of `most`.
      unless: another field of the dataclass, or of one within it (a.b); where that is set, this one
        is not read and may hold any number.
    """
    bounds = Bounds(least, above, most, below)
    return dataclasses.field(default=default, metadata={"rule": bounds, "unless": unless})


def choice(
    default: Any = _REQUIRED, values: Iterable[str] | Callable[[], Iterable[str]] = ()
) -> Any:
    """A field of some texts; `values` may be what returns them."""
    return dataclasses.field(default=default, metadata={"rule": Choices(values)})


def not_empty(default: Any = _REQUIRED, allowed: str = "a text") -> Any:
    """A field of any text but the empty one; `allowed` says what belongs there."""
    return dataclasses.field(default=default, metadata={"rule": NotEmpty(allowed)})


def free(default: Any, reason: str) -> Any:
    """A field of anything of its type; `reason` says why, or who checks it."""
    return dataclasses.field(default=default, metadata={"rule": Free(reason)})


def rule_of(field: dataclasses.Field[Any]) -> Rule | None:
    """What a field may hold; None for a truth value, a group of fields and what has no rule."""
    return field.metadata.get("rule")


# Checks


def require(condition: bool, config: Any, field: str, allowed: str) -> None:
    """Refuses a field of a dataclass for what another one holds.

    Args:
      condition: whether all is well.
      config: the dataclass.
      field: the field to name.
      allowed: what it may hold, next to the others.

    Raises:
      FieldError: the condition does not hold.
    """
    if not condition:
        raise FieldError(f"{type(config).__name__}.", field, getattr(config, field), allowed)


def check(config: Any, prefix: str | None = None) -> None:
    """Checks type and value of every field that has a rule, and the type of truth values.

    Args:
      config: a dataclass; those within it check themselves.
      prefix: what stands before the names of fields in messages; by default the class and a dot.

    Raises:
      ValueError: for the first field that holds what it may not.
    """
    prefix = f"{type(config).__name__}." if prefix is None else prefix
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if rule_of(field) or hints[field.name] is bool:
            _typed(hints[field.name], getattr(config, field.name), prefix, field)
    _check_rules(type(config), vars(config), prefix)


def build(cls: type[T], values: Any, path: str, *, defaults: bool = False) -> T:
    """The dataclass `cls`, and those within it, from nested mappings; every field is checked.

    Of the types only int -> float and list -> tuple are converted.

    Args:
      cls: the dataclass.
      values: its fields by name.
      path: of `cls` in the whole, for messages.
      defaults: fields with a default may be missing.

    Raises:
      ValueError: unknown or missing field, wrong type, value out of range, or what the class itself
        refuses; with the path of the field.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: got {checked_json.shown(values)}; allowed: a group of fields")
    known = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{path}.{unknown[0]}: unknown field; allowed: {', '.join(known)}")
    needed = [name for name, field in known.items() if not defaults or _is_required(field)]
    if missing := sorted(set(needed) - set(values)):
        raise ValueError(f"{path}.{missing[0]}: missing")

    hints, prefix = typing.get_type_hints(cls), f"{path}."
    made = {
        name: build(hints[name], values[name], f"{path}.{name}", defaults=defaults)
        if dataclasses.is_dataclass(hints[name])
        else _typed(hints[name], values[name], prefix, field)
        for name, field in known.items()
        if name in values
    }
    _check_rules(cls, made, prefix)
    try:
        return cls(**made)
    except FieldError as error:  # of fields that depend on each other
        raise FieldError(prefix, error.field, error.value, error.allowed) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _check_rules(cls: type, values: Mapping[str, Any], prefix: str) -> None:
    """Checks the values of a dataclass, of the right types, against the rules of its fields."""
    for field in dataclasses.fields(cls):
        rule, unless = rule_of(field), field.metadata.get("unless")
        if rule is None or field.name not in values or (unless and _reach(values, unless)):
            continue
        value = values[field.name]
        if isinstance(value, (tuple, list)):
            if not value or not all(map(rule.admits, value)):
                raise FieldError(prefix, field.name, value, f"one or more, each {rule.allowed}")
        elif isinstance(value, Mapping):
            for name, part in value.items():
                if not rule.admits(part):
                    raise FieldError(prefix, f"{field.name}.{name}", part, rule.allowed)
        elif not rule.admits(value):
            raise FieldError(prefix, field.name, value, rule.allowed)


def _reach(values: Mapping[str, Any], path: str) -> Any:
    first, *others = path.split(".")
    found = values[first]
    for name in others:
        found = getattr(found, name)
    return found


# Types


def _typed(hint: Any, value: Any, prefix: str, field: dataclasses.Field[Any]) -> Any:
    """`value` as the annotated type of a field: a number, truth value, text, tuple or mapping."""
    origin, arguments, path = typing.get_origin(hint), typing.get_args(hint), prefix + field.name
    if origin is FrozenDict:
        return _typed_mapping(arguments[1], value, path, field.default)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{path}: got {_with_type(value)}; allowed: a tuple")
        return tuple(_typed_leaf(arguments[0], part, path) for part in value)
    return _typed_leaf(hint, value, path)


def _typed_mapping(hint: type, value: Any, path: str, default: Any) -> FrozenDict[str, Any]:
    """A mapping with any names: those of the default first and in its order, then by name."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: got {checked_json.shown(value)}; allowed: values by name")
    # A ConfigDict keeps no order, and the last digit of a sum depends on it.
    order = [*(n for n in default if n in value), *sorted(set(value) - set(default))]
    return FrozenDict((n, _typed_leaf(hint, value[n], f"{path}.{n}")) for n in order)


def _typed_leaf(hint: type, value: Any, path: str) -> Any:
    # bool is an int in Python; a flag in place of a number is a mistake.
    flag_for_number = isinstance(value, bool) and hint is not bool
    if hint is float and isinstance(value, int) and not flag_for_number:
        try:
            return float(value)
        except OverflowError:
            got = checked_json.shown(value)
            raise ValueError(f"{path}: got {got}; allowed: finite numbers") from None
    if not isinstance(value, hint) or flag_for_number:
        raise ValueError(f"{path}: got {_with_type(value)}; allowed: {hint.__name__}")
    if hint is int and not -_MAX_INTEGER <= value < _MAX_INTEGER:
        got = checked_json.shown(value)
        raise ValueError(f"{path}: got {got}; allowed: whole numbers of 64 bits")
    return value


def _with_type(value: Any) -> str:
    return f"{checked_json.shown(value)} ({type(value).__name__})"
