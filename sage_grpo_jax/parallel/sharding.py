"""Logical axis names of parameters -> mesh axes.

The models name the axes of their parameters (`models.*.partition_names`); `models.axes` says where
those names go. The model-width axis is cut, everything else is replicated.
"""

import math
from typing import Any

import jax
import optax
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from sage_grpo_jax.models import axes as axes_lib


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """The samples of axis `axis` are divided over the batch axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, axes_lib.BATCH))


def _spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> PartitionSpec:
    """The spec of one array; an axis that does not divide evenly stays whole."""
    if len(names) != len(shape):
        raise ValueError(f"partition names {names} do not fit the shape {shape}")
    entries, taken = [], set()
    for name, size in zip(names, shape, strict=True):
        # A mesh axis can cut an array only once: where two axes of it have the name, the first
        # wins.
        axes = tuple(a for a in axes_lib.PARAMETERS.get(name, ()) if a not in taken) if name else ()
        # The last axes are left out first: width 6 on fsdp 2 × context 4 is cut over fsdp alone.
        while axes and size % math.prod(mesh.shape[a] for a in axes):
            axes = axes[:-1]
        taken.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def parameter_shardings(mesh: jax.sharding.Mesh, names: Any, abstract: Any) -> Any:
    """Shardings for a tree of parameters.

    Args:
      mesh: the device mesh.
      names: tree of tuples of logical names, as `models.*.partition_names` returns.
      abstract: the same tree with anything that has `.shape`.
    """
    return jax.tree.map(
        lambda array, axis_names: NamedSharding(mesh, _spec(axis_names, array.shape, mesh)),
        abstract,
        names,
    )


def optimizer_shardings(
    tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, abstract_params: Any, shardings: Any
) -> Any:
    """Shardings for `tx.init(params)`: what mirrors a parameter follows it, the rest is replicated.

    Without them `jit(tx.init)` replicates the moments on every device. A leaf mirrors a parameter
    if its path ends with that of the parameter and the shapes are the same.
    (`optax.tree.map_params` cannot tell for transformations that look at the parameters while they
    partition them, as Muon does.)
    """
    where = traverse_util.flatten_dict(shardings)
    shapes = {
        path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract_params).items()
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The path mu/blocks/kernel ends with that of the parameter blocks/kernel. Longer endings
        # are tried first.
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):
            if shapes.get(names[start:]) == leaf.shape:
                return where[names[start:]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, abstract_params))
