"""Key tables: how the tensors of a checkpoint map onto our parameter tree, as data.

A table is a list of `Row`s. One row ties one of our parameters to one tensor of the other layout, or,
where our layers are stacked on a leading axis, to one tensor per layer. The mapping is strict in both
directions: every tensor of the file is used exactly once, every parameter is produced exactly once, and
a mismatch is an error that lists the names.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor is laid out there and here.

    Attributes:
      permutation: ours = transpose(theirs, permutation), after `unit_axes` were dropped.
      unit_axes: number of trailing axes of size 1 that exist only in their layout.
    """

    permutation: tuple[int, ...]
    unit_axes: int = 0

    def shape_there(self, shape_here: tuple[int, ...]) -> tuple[int, ...]:
        there = [0] * len(self.permutation)
        for axis_here, axis_there in enumerate(self.permutation):
            there[axis_there] = shape_here[axis_here]
        return tuple(there) + (1,) * self.unit_axes

    def index_there(self, index_here: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of their tensor that holds a slice of ours."""
        there = [slice(None)] * len(self.permutation)
        for axis_here, axis_there in enumerate(self.permutation):
            there[axis_there] = index_here[axis_here]
        return tuple(there) + (slice(None),) * self.unit_axes

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        core = theirs.reshape(theirs.shape[: theirs.ndim - self.unit_axes])
        return np.transpose(core, self.permutation)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        core = np.transpose(ours, np.argsort(self.permutation))
        return np.ascontiguousarray(core).reshape(core.shape + (1,) * self.unit_axes)


# PyTorch's layout on the left of each comment, ours on the right.
LAYOUTS: Mapping[str, Layout] = {
    "vector": Layout((0,)),  # [n] -> [n]: biases, norm scales
    "embedding": Layout((0, 1)),  # [n, d] -> [n, d]
    "linear": Layout((1, 0)),  # [out, in] -> [in, out]
    "conv2d": Layout((2, 3, 1, 0)),  # [out, in, h, w] -> [h, w, in, out]
    "conv3d": Layout((2, 3, 4, 1, 0)),  # [out, in, t, h, w] -> [t, h, w, in, out]
    "pointwise2d": Layout((1, 0), 2),  # [out, in, 1, 1] -> [in, out]: a 1x1 convolution
    "pointwise3d": Layout((1, 0), 3),  # [out, in, 1, 1, 1] -> [in, out]
    "scale2d": Layout((0,), 2),  # [n, 1, 1] -> [n]: a norm scale shaped to broadcast
    "scale3d": Layout((0,), 3),  # [n, 1, 1, 1] -> [n]
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of ours and the tensor, or the tensors, it comes from.

    Attributes:
      ours: path in our nested dict, e.g. ("blocks", "image_mlp", "in", "kernel").
      theirs: their name. With `stacked`, "{i}" in it stands for the layer index 0 ... stacked - 1.
      kind: a key of LAYOUTS.
      stacked: number of layers on the leading axis of our parameter, or None for a single tensor.
    """

    ours: tuple[str, ...]
    theirs: str
    kind: str
    stacked: int | None = None

    def __post_init__(self):
        if self.kind not in LAYOUTS:
            raise ValueError(
                f"kind={self.kind!r} of row {self.theirs!r}: use one of {list(LAYOUTS)}"
            )
        if (self.stacked is not None) != ("{i}" in self.theirs):
            raise ValueError(
                f"row {self.theirs!r}: '{{i}}' goes with stacked, stacked={self.stacked}"
            )

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.kind]

    def names(self) -> list[str]:
        """Their names, in layer order."""
        if self.stacked is None:
            return [self.theirs]
        return [self.theirs.replace("{i}", str(i)) for i in range(self.stacked)]


def linear(ours: tuple[str, ...], theirs: str, stacked: int | None = None) -> list[Row]:
    """Rows of a dense layer with bias: ours (kernel, bias), theirs (weight, bias)."""
    return with_bias(ours, theirs, "linear", stacked)


def with_bias(
    ours: tuple[str, ...], theirs: str, kind: str, stacked: int | None = None
) -> list[Row]:
    """Rows of a layer with a kernel of the given kind and a bias."""
    return [
        Row((*ours, "kernel"), f"{theirs}.weight", kind, stacked),
        Row((*ours, "bias"), f"{theirs}.bias", "vector", stacked),
    ]
