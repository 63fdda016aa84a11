"""Key tables: how the tensors of a checkpoint map onto our parameter tree, as data.

A table is a list of `Row`s. One row ties one of our parameters to one tensor of the other layout,
or, where our layers are stacked on a leading axis, to one tensor per layer; a tensor that fuses
several parameters has one row for each of them. The mapping is strict both ways: every tensor of
the file is used exactly once, every parameter is produced exactly once, and a mismatch is an error
that lists the names.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sage_grpo_jax.weights.formats.source import Path, Shape, contiguous


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor is laid out there and here.

    Attributes:
      permutation: ours = transpose(theirs, permutation), after `unit_axes` were dropped.
      unit_axes: number of trailing axes of size 1 that exist only in their layout.
    """

    permutation: tuple[int, ...]
    unit_axes: int = 0

    def shape_there(self, shape_here: Shape) -> Shape:
        return self._there(shape_here) + (1,) * self.unit_axes

    def index_there(self, index_here: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of their tensor that holds a slice of ours."""
        return self._there(index_here) + (slice(None),) * self.unit_axes

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        core = theirs.reshape(theirs.shape[: theirs.ndim - self.unit_axes])
        return np.transpose(core, self.permutation)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        core = contiguous(np.transpose(ours, np.argsort(self.permutation)))
        return core.reshape(core.shape + (1,) * self.unit_axes)

    def _there(self, here: tuple) -> tuple:
        if len(here) != len(self.permutation):
            raise ValueError(f"{len(self.permutation)} axes expected, got {here}")
        return tuple(here[axis] for axis in np.argsort(self.permutation))


# PyTorch's layout on the left of each comment, ours on the right.
LAYOUTS: Mapping[str, Layout] = {
    "vector": Layout((0,)),  # [n] -> [n]: biases, norm scales
    "embedding": Layout((0, 1)),  # [n, d] -> [n, d]
    "table": Layout((0, 1, 2)),  # [1, n, d] -> [1, n, d]: rows that are added to modulation
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
      ours: path in our nested dict, e.g. ("blocks", "image", "mlp", "in", "kernel").
      theirs: their name. With `stacked`, "{i}" in it stands for the layer index 0 ... stacked - 1.
      kind: a key of LAYOUTS.
      stacked: number of layers on the leading axis of our parameter, or None for a single tensor.
      part: (k, n): our parameter is the k-th of n equal parts along the first axis of their tensor.
      swapped: the two halves along the first axis of their tensor change places.
    """

    ours: Path
    theirs: str
    kind: str
    stacked: int | None = None
    part: tuple[int, int] = (0, 1)
    swapped: bool = False

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"row {self.theirs}: kind={self.kind!r}: use one of {list(LAYOUTS)}")
        if (self.stacked is not None) != ("{i}" in self.theirs):
            raise ValueError(f"row {self.theirs}: '{{i}}' goes with stacked={self.stacked}")
        if not 0 <= self.part[0] < self.part[1] or (self.swapped and self.part != (0, 1)):
            raise ValueError(f"row {self.theirs}: part={self.part}, swapped={self.swapped}")

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.kind]

    def names(self) -> list[str]:
        """Their names, in layer order."""
        if self.stacked is None:
            return [self.theirs]
        return [self.theirs.format(i=i) for i in range(self.stacked)]

    def layer_shape(self, shape_here: Shape) -> Shape:
        """Shape of one layer of our parameter."""
        return shape_here if self.stacked is None else shape_here[1:]

    def shape_there(self, shape_here: Shape) -> Shape:
        """Shape of each of their tensors, given the shape of our parameter."""
        first, *rest = self.layout.shape_there(self.layer_shape(shape_here))
        return (first * self.part[1], *rest)

    def index_there(self, index_here: tuple[slice, ...], layer_shape: Shape) -> tuple[slice, ...]:
        """The slice of their tensor to read for a slice of one of our layers.

        Their first axis is taken whole where its halves are swapped; `to_ours` then selects.
        """
        first, *rest = self.layout.index_there(index_here)
        size = self.layout.shape_there(layer_shape)[0]
        if self.swapped:
            return (slice(0, size), *rest)
        start, stop, _ = first.indices(size)
        return (slice(self.part[0] * size + start, self.part[0] * size + stop), *rest)

    def to_ours(self, theirs: np.ndarray, index_here: tuple[slice, ...]) -> np.ndarray:
        """The slice of our layer, from what `index_there` selected."""
        if self.swapped:
            half = theirs.shape[0] // 2
            theirs = np.concatenate([theirs[half:], theirs[:half]])
            theirs = theirs[self.layout.index_there(index_here)[0]]
        return self.layout.to_ours(theirs)

    def to_theirs(self, layer: np.ndarray) -> tuple[int, np.ndarray]:
        """(offset, values): what one of our layers puts at `offset` on their first axis."""
        theirs = self.layout.to_theirs(layer)
        if self.swapped:
            half = theirs.shape[0] // 2
            theirs = np.concatenate([theirs[half:], theirs[:half]])
        return self.part[0] * theirs.shape[0], theirs


def with_bias(ours: Path, theirs: str, kind: str, stacked: int | None = None) -> list[Row]:
    """Rows of a layer: our kernel and bias, their weight (of the given kind) and bias."""
    return [
        Row((*ours, "kernel"), f"{theirs}.weight", kind, stacked),
        Row((*ours, "bias"), f"{theirs}.bias", "vector", stacked),
    ]


def linear(ours: Path, theirs: str, stacked: int | None = None) -> list[Row]:
    """Rows of a dense layer with bias."""
    return with_bias(ours, theirs, "linear", stacked)


def norm(ours: Path, theirs: str, stacked: int | None = None) -> list[Row]:
    """Rows of a layer norm with scale and bias."""
    return [
        Row((*ours, "scale"), f"{theirs}.weight", "vector", stacked),
        Row((*ours, "bias"), f"{theirs}.bias", "vector", stacked),
    ]


def check_parameters(rows: Sequence[Row], parameters: Mapping[Path, Shape]) -> None:
    """Checks that the rows cover our parameters, each exactly once.

    Raises:
      ValueError: lists parameters without a row, rows without a parameter, rows given twice.
    """
    _check_names(
        "parameters do not fit the key table",
        expected=["/".join(row.ours) for row in rows],
        found=["/".join(path) for path in parameters],
    )
    for row in rows:
        if row.stacked is not None and parameters[row.ours][0] != row.stacked:
            raise ValueError(
                f"parameter {'/'.join(row.ours)}: shape {parameters[row.ours]} has"
                f" {parameters[row.ours][0]} layers, the key table {row.stacked}"
            )


def check_tensors(
    rows: Sequence[Row], parameters: Mapping[Path, Shape], tensors: Mapping[str, Shape]
) -> None:
    """Checks that the rows use their tensors, each exactly once, and that all shapes fit.

    A fused tensor counts as used once when all of its parts are.

    Raises:
      ValueError: lists missing, unexpected and misshapen tensors.
    """
    _check_names("tensors do not fit the key table", _uses(rows), list(tensors))

    misshapen = []
    for row in rows:
        want = row.shape_there(parameters[row.ours])
        misshapen += [
            f"{name}: {tuple(tensors[name])} instead of {want}"
            for name in row.names()
            if tuple(tensors[name]) != want
        ]
    if misshapen:
        raise ValueError(f"tensors of the wrong shape: {_listed(misshapen)}")


def _uses(rows: Sequence[Row]) -> list[str]:
    """Names of their tensors, one for each complete set of parts (or overlapping part)."""
    parts = defaultdict(list)
    for row in rows:
        for name in row.names():
            parts[name].append(row.part)
    uses = []
    for name, given in parts.items():
        whole = [(k, given[0][1]) for k in range(given[0][1])]
        if not set(whole) <= set(given):
            raise ValueError(f"key table: only the parts {given} of {name} have a row")
        uses += [name] * (1 + len(given) - len(whole))
    return uses


def _check_names(title: str, expected: Iterable[str], found: Iterable[str]) -> None:
    expected, found = Counter(expected), Counter(found)
    problems = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "named twice": {name for name, n in (expected | found).items() if n > 1},
    }
    text = [f"{what}: {_listed(sorted(names))}" for what, names in problems.items() if names]
    if text:
        raise ValueError(f"{title}; " + "; ".join(text))


def _listed(names: Sequence[str], limit: int = 50) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
