"""Sweeps: the points that a config file asks for, and a folder for each.

A config file with a sweep has, beside `get_config(arg)`, a function `sweep(add)` that calls
`add(overrides)` once a point, overrides by dotted name:

    def sweep(add):
        for point in sweeps.product({"rollout.eta": [0.3, 0.5], "seed": [0, 1, 2]}):
            add(point)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from sage_grpo_jax.config import builder, methods, schema, step_plan
from sage_grpo_jax.training import metrics
from sage_grpo_jax.training import workdir as workdir_lib

SWEEP_FILE = "sweep.json"
SEED = "seed"
Overrides = dict[str, Any]


def product(axes: Mapping[str, Sequence[Any]]) -> Iterator[Overrides]:
    """Every combination of the values; the last axis varies fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def zipped(axes: Mapping[str, Sequence[Any]]) -> Iterator[Overrides]:
    """First values together, second values together, and so on; ValueError for other lengths."""
    lengths = {name: len(values) for name, values in axes.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"zipped: the axes have lengths {lengths}; allowed: the same for all")
    for values in zip(*axes.values(), strict=True):
        yield dict(zip(axes, values, strict=True))


def load_module(path: str | pathlib.Path) -> Any:
    """A config file as a module, so that one recipe can build on another."""
    path = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    index: int
    overrides: Overrides
    folder: pathlib.Path
    config: schema.Config

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def summary(self) -> dict[str, Any] | None:
        """Of the run that has reached the last step of its config; None before.

        Raises:
          ValueError: summary.json cannot be read.
        """
        return workdir_lib.finished(self.config, self.folder)

    @property
    def status(self) -> str:
        """finished, started or new."""
        if self.summary is not None:
            return "finished"
        return "started" if (self.folder / metrics.METRICS_FILE).exists() else "new"


def read_points(path: str, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Point]:
    """All points of a config file, every one validated before any is run.

    Args:
      path: of the config file.
      config: what `get_config` returned, with the overrides of the command line.
      workdir: of the sweep.

    Raises:
      ValueError: no `sweep` in the file, no points, a point twice, or a bad value; naming it.
    """
    given = _call_sweep(path)
    if not given:
        raise ValueError(f"--config: sweep(add) of {path} adds no point")
    # Two runs of one point would write into two folders and count as two seeds.
    texts = [json.dumps(overrides, sort_keys=True) for overrides in given]
    if twice := {text for text in texts if texts.count(text) > 1}:
        raise ValueError(f"--config: sweep(add) of {path} adds a point twice: {min(twice)}")
    return [_make_point(i, overrides, config, workdir) for i, overrides in enumerate(given)]


def _call_sweep(path: str) -> list[Overrides]:
    """What `sweep(add)` of a file adds."""
    given: list[Overrides] = []
    try:
        function = getattr(load_module(path), "sweep", None)
        if callable(function):
            function(lambda overrides: given.append(_plain(overrides, len(given))))
    except Exception as error:  # a config file is code: it may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"--config: sweep(add) of {path} failed: {kind}{error}") from error
    if not callable(function):
        raise ValueError(f"--config: {path} has no function sweep(add)")
    return given


def _plain(overrides: Any, index: int) -> Overrides:
    """The overrides of a point with Python's own numbers, as a command line and JSON can hold."""
    # Names first, then values: what flags and JSON can say, and no more.
    if not isinstance(overrides, Mapping) or not all(isinstance(name, str) for name in overrides):
        raise ValueError(
            f"point {index}: add got {overrides!r}; allowed: overrides by dotted name, as in "
            "add({'rollout.eta': 0.5})"
        )

    plain = {name: _plain_value(value) for name, value in overrides.items()}
    for name, value in plain.items():
        if not isinstance(value, str | int | float | bool | None):
            raise ValueError(
                f"point {index}: {name} is {value!r}; allowed: a text, a number or a truth value"
            )
    return plain


def _plain_value(value: Any) -> Any:
    """NumPy's and JAX's scalars as Python's."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def _make_point(
    index: int, overrides: Overrides, config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Point:
    # A copy, so that no point sees the overrides of another.
    copy = ml_collections.ConfigDict(config).copy_and_resolve_references()
    try:
        # A method is a set of values that `get_config` applies; its name alone changes nothing.
        if "method" in overrides:
            raise ValueError(methods.name_alone(overrides["method"]))
        copy.update_from_flattened_dict(overrides)
        validated = builder.from_config_dict(copy)
        # What only the plan refuses would otherwise fail after hours of other points.
        step_plan.plan_steps(validated)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"point {index} of the sweep, {overrides}: {error}") from error
    folder = workdir / "runs" / f"{index:03d}_{_slug(overrides)}"
    return Point(index, overrides, folder, validated)


def _slug(overrides: Overrides) -> str:
    """The overrides as a short file name: last parts of the names."""
    text = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in overrides.items())
    return re.sub(r"[^\w.,=+-]", "_", text)[:120]


def flags_of(overrides: Overrides) -> list[str]:
    """The overrides as flags of `train`."""
    return [f"--config.{name}={value}" for name, value in overrides.items()]


def forward_passes(config: schema.Config) -> tuple[int, int]:
    """Transformer passes of a step (one sample, one branch each): of the rollout, of the update.

    A backward pass counts as two; a reference of the penalty, and the policy that sampled in the
    forward-process loss, as one.
    """
    rollout, region, loss = config.rollout, config.trust_region, config.loss
    # Passes for each entry (a trained step of a sample): forward of policy and references in all
    # branches; backward, counted as two, in the branches that have a gradient.
    forward = loss.objective == "nft"
    branches = 1 if rollout.guidance == 1.0 else 2
    with_gradient = 1 if loss.guidance_gradient == "condition" else branches
    others = region.has_anchor + region.has_previous + forward
    entry = branches * (1 + others) + 2 * with_gradient

    # How often an entry is gone through.
    updates = float(loss.updates_per_rollout)
    if loss.split_updates:
        # The first update goes through all samples, to record the means of the later ones.
        updates = 1.0 if forward else 2.0 - 1.0 / updates

    trained = step_plan.plan_steps(config).positions
    return (
        config.batch_size * rollout.num_steps * branches,
        round(config.batch_size * trained * entry * updates),
    )


def write_index(path: str, points: Sequence[Point], workdir: pathlib.Path) -> None:
    """Writes sweep.json: what `report` needs to find and to label the runs."""
    rows = [
        {"index": p.index, "folder": str(p.folder.relative_to(workdir)), "overrides": p.overrides}
        for p in points
    ]
    metrics.write_json(workdir / SWEEP_FILE, {"config": str(path), "points": rows})
