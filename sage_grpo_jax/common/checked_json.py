"""JSON from files of others: bounded in size, typed, every complaint with its field.

The `json` module alone takes NaN, infinity, one key twice, any nesting until Python's stack ends,
and leaves types to whoever trips over them. Everything that is read from a file comes through here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import reprlib
import types
import typing
from typing import Any

MAX_BYTES = 1 << 20  # a config has a few thousand
_MAX_INTEGER = 1 << 63
_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string",
          type(None): "null", dict: "an object"}  # fmt: skip
_ABSENT = object()


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        """Python refuses to write integers of thousands of digits."""
        bits = value.bit_length()
        return f"an integer of {bits} bits" if bits > 128 else repr(value)


_SHORT = _Short()


def load(path: pathlib.Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: naming the file: cannot be read, too large, not JSON, not an object.
    """
    try:
        with path.open("rb") as file:
            # One byte more than is allowed shows that a file is too large, without reading all of
            # it.
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return parse(text, max_bytes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(text: bytes | str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a text; refuses NaN, infinities and keys that are there twice.

    Raises:
      ValueError: too long, not UTF-8, not JSON, nested too deeply, not an object.
    """
    if len(text) > max_bytes:
        raise ValueError(f"longer than {max_bytes} bytes")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        values = json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits is one, too
        raise ValueError(f"not JSON: {str(error).partition('; use sys.')[0]}") from error
    if type(values) is not dict:
        raise ValueError(f"not a JSON object: {shown(values)}")
    return values


def typed(value: Any, hint: Any, field: str) -> Any:
    """The value, if it has the type of an annotation.

    Args:
      value: as `json` gives it.
      hint: int, float (finite; integers too), bool, str, None, dict, list[...], tuple[...] (from a
        list), dict[str, ...], and unions of these. No boolean passes for a number.
      field: for the message.

    Raises:
      ValueError: another type, or a number that is not finite or beyond 64 bits.
    """
    if not _fits(value, hint):
        raise ValueError(f"{field}={shown(value)}: must be {_described(hint)}")
    return value


def fields(cls: type, values: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Values for the fields of a dataclass, checked against its annotations.

    Args:
      cls: the dataclass.
      values: of some of its fields.
      without: fields that do not come from files.

    Raises:
      ValueError: unknown fields; values of another type.
    """
    known = {field.name for field in dataclasses.fields(cls)} - set(without)
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown fields {shown(unknown)}: must be only {sorted(known)}")
    hints = typing.get_type_hints(cls)
    return {name: typed(value, hints[name], name) for name, value in values.items()}


def member(values: dict[str, Any], name: str, hint: Any, field: str | None = None) -> Any:
    """A value that has to be there, of the type of an annotation; see `typed`."""
    field = field or name
    if name not in values:
        raise ValueError(f"{field} is missing: must be {_described(hint)}")
    return typed(values[name], hint, field)


def shown(value: Any) -> str:
    """`repr`, but short, whatever the value is."""
    return _SHORT.repr(value)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A later key would silently replace the earlier one; what is missing afterwards was there
    # twice.
    values = dict(pairs)
    if len(values) < len(pairs):
        left = dict(pairs)
        twice = next(name for name, _ in pairs if left.pop(name, _ABSENT) is _ABSENT)
        raise ValueError(f"key {shown(twice)} is there twice")
    return values


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in arguments)
    if origin is dict:
        return type(value) is dict and all(_fits(v, arguments[1]) for v in value.values())
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return type(value) is list and all(_fits(v, arguments[0]) for v in value)
    if origin is tuple:
        same = type(value) is list and len(value) == len(arguments)
        return same and all(map(_fits, value, arguments))
    if hint is float and type(value) is float:
        return math.isfinite(value)
    # `isinstance` would take True for 1: a bool is an int in Python.
    if hint in (int, float) and type(value) is int:
        return -_MAX_INTEGER <= value < _MAX_INTEGER
    return value is None if hint in (None, type(None)) else type(value) is hint


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_described, arguments))
    if origin is dict:
        return f"an object whose values are each {_described(arguments[1])}"
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list, each {_described(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_described(arguments[0])}"
    return _NAMES[hint]
