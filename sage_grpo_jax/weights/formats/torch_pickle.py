"""The pickle of a `torch.save` archive, interpreted: nothing in it runs, nothing in it is imported.

A small machine for the few opcodes that dictionaries, lists, numbers, strings and tensors need.
Each costs what it takes in the file: none copies, repeats or reserves. Names of opcodes are those
of `pickletools`.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from sage_grpo_jax.common.checked_json import shown
from sage_grpo_jax.weights.formats import headers

MAX_BYTES = 8 << 20  # 1,500 tensors with their optimizer have one
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
           "bool")  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """The values behind tensors: `count` of a dtype in the archive's member data/`key`."""

    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What a name in the pickle stands for; `build` takes the arguments."""

    name: str
    build: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Name:
    """A name that is no function: the class of a storage, or a dtype."""

    name: str
    dtype: np.dtype


def load(text: bytes) -> Any:
    """The object that a pickle describes, with `Tensor` in place of tensors.

    Raises:
      ValueError: damaged; or with anything in it but tensors, containers, numbers and strings.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"its pickle has {len(text)} bytes: must be at most {MAX_BYTES}")
    try:
        return _Machine().run(text)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        # The stack is empty, the memo has no such entry, an operand is of another kind.
        raise ValueError(f"its pickle is damaged: {error!r}") from error


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, text: bytes) -> Any:
        for opcode, argument, position in _opcodes(text):
            if opcode == "STOP":
                return self._stack.pop()
            if opcode in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode])
            elif opcode in _LITERALS:
                self._stack.append(argument)
            elif (step := getattr(self, f"_{opcode.lower()}", None)) is not None:
                step(argument)
            elif opcode not in _WITHOUT_EFFECT:
                raise ValueError(f"its pickle has {opcode} at byte {position}: not of torch.save")
        raise ValueError("its pickle is cut off")

    # The memo: objects that are used again.

    def _binput(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _long_binput = _put = _binput

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _long_binget = _get = _binget

    # Containers.

    def _mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _above_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _empty_dict(self, _: None) -> None:
        self._stack.append({})

    def _empty_list(self, _: None) -> None:
        self._stack.append([])

    def _empty_set(self, _: None) -> None:
        self._stack.append([])  # no tensor is in one

    def _tuple(self, _: None) -> None:
        items = tuple(self._above_mark())
        self._stack.append(items)

    def _list(self, _: None) -> None:
        items = self._above_mark()
        self._stack.append(items)

    _frozenset = _list

    def _dict(self, _: None) -> None:
        items = self._above_mark()
        self._stack.append(_set_items({}, items))

    def _tuple1(self, _: None) -> None:
        self._take(1)

    def _tuple2(self, _: None) -> None:
        self._take(2)

    def _tuple3(self, _: None) -> None:
        self._take(3)

    def _take(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _append(self, _: None) -> None:
        value = self._stack.pop()
        _list_of(self._stack[-1]).append(value)

    def _appends(self, _: None) -> None:
        items = self._above_mark()
        _list_of(self._stack[-1]).extend(items)

    _additems = _appends

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _set_items(self._stack[-1], [key, value])

    def _setitems(self, _: None) -> None:
        items = self._above_mark()
        _set_items(self._stack[-1], items)

    def _pop(self, _: None) -> None:
        self._stack.pop()

    def _pop_mark(self, _: None) -> None:
        self._above_mark()

    # Names, and what is made of them.

    def _global(self, argument: str) -> None:
        self._stack.append(_find(*argument.split(" ", 1)))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_find(module, name))

    def _reduce(self, _: None) -> None:
        arguments, call = self._stack.pop(), self._stack.pop()
        if type(call) is not _Call or type(arguments) is not tuple:
            raise ValueError(f"its pickle is damaged: {shown(call)} is called")
        self._stack.append(call.build(*arguments))

    def _build(self, _: None) -> None:
        self._stack.pop()  # attributes of a dictionary: state_dict() has its versions there
        if type(self._stack[-1]) is not dict:
            raise ValueError("its pickle is damaged: attributes of something without")

    def _binpersid(self, _: None) -> None:
        match self._stack.pop():
            case ("storage", _Name(dtype=dtype), str(key), str(), int(count)) if count >= 0:
                headers.check_name(key)
                self._stack.append(Storage(dtype, key, count))
            case identifier:
                raise ValueError(f"unknown storage {shown(identifier)}")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING"),
}
_WITHOUT_EFFECT = {"PROTO", "FRAME"}


def _opcodes(text: bytes) -> Iterator[tuple[str, Any, int]]:
    """(name, argument, position) of each opcode."""
    try:
        for opcode, argument, position in pickletools.genops(text):
            yield opcode.name, argument, position
    except Exception as error:  # its readers of arguments raise what they happen to
        raise ValueError(f"its pickle is damaged: {error}") from error


def _find(module: str, name: str) -> _Call | _Name:
    if type(module) is not str or type(name) is not str:
        raise ValueError("its pickle is damaged: a name that is no text")
    if (module, name) in _CALLS:
        return _Call(name, _CALLS[module, name])
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _Name(name, np.dtype(_STORAGES[name]))
    if module == "torch" and name in _DTYPES:
        return _Name(name, np.dtype(np.void))
    raise ValueError(
        f"holds {shown(f'{module}.{name}')[1:-1]}: only tensors, dictionaries, lists, numbers and "
        "strings are read; save its state dict alone"
    )


def _set_items(values: Any, items: list[Any]) -> dict:
    if type(values) is not dict or len(items) % 2:
        raise ValueError("its pickle is damaged: no dictionary where one must be")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise ValueError(f"key {shown(key)} of a dictionary: must be a string or a number")
        values[key] = value
    return values


def _list_of(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("its pickle is damaged: no list where one must be")
    return value


# What names stand for. The arguments are the pickle's: anything.


def _ordered_dict(*items: Any) -> dict:
    if items:
        raise ValueError("its pickle is damaged: an OrderedDict that is made of something")
    return {}


def _size(*values: Any) -> tuple[int, ...]:
    """torch.Size."""
    return _sizes(values[0] if values else (), "a torch.Size")


def _tensor(
    storage: Any = None, offset: Any = None, shape: Any = None, strides: Any = None, *_ignored: Any
) -> Tensor:
    """torch._utils._rebuild_tensor_v2: (.., requires_grad, hooks, metadata)."""
    if type(storage) is not Storage:
        raise ValueError(f"a tensor without storage ({shown(storage)})")
    shape, strides = _sizes(shape, "shape"), _sizes(strides, "strides")
    if len(shape) != len(strides) or math.prod(shape) >= 1 << 40:
        raise ValueError(f"a tensor with sizes {shape}, strides {strides}")
    return Tensor(storage, _sizes((offset,), "offset")[0], shape, strides)


def _parameter(data: Any = None, *_ignored: Any) -> Tensor:
    """torch._utils._rebuild_parameter: (data, requires_grad, hooks)."""
    if type(data) is not Tensor:
        raise ValueError(f"a parameter that is no tensor ({shown(data)})")
    return data


def _sizes(values: Any, what: str) -> tuple[int, ...]:
    fine = isinstance(values, tuple | list) and len(values) <= headers.MAX_AXES
    if not fine or not all(type(n) is int and 0 <= n < 1 << 48 for n in values):
        raise ValueError(f"a tensor whose {what} is {shown(values)}")
    return tuple(values)


_CALLS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
