"""The device mesh: one SPMD mesh with the axes `data`, `fsdp` and `context`."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils

from sage_grpo_jax.models import axes

AXES, BATCH_AXES = axes.MESH, axes.BATCH


def resolve_axis_sizes(sizes: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Replaces the one -1 in `sizes` by what is left of `num_devices`.

    Args:
      sizes: devices along `data`, `fsdp`, `context`; at most one of them -1 ("the rest").
      num_devices: how many devices there are.

    Raises:
      ValueError: the sizes do not multiply to `num_devices`.
    """
    sizes = list(sizes)
    if len(sizes) != len(AXES) or any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise ValueError(
            f"mesh: got {dict(zip(AXES, sizes, strict=False))}; allowed: sizes of at least 1 for "
            f"{', '.join(AXES)}, at most one of them -1 (the devices that are left)"
        )

    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
        known = num_devices

    if known != num_devices:
        raise ValueError(
            f"mesh: {dict(zip(AXES, sizes, strict=True))} multiplies to {known}, but there are "
            f"{num_devices} devices; allowed: sizes whose product is {num_devices}"
        )
    return tuple(sizes)


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """The mesh over all devices (or `devices`), with the physical neighbours along `context`.

    Axes are `AxisType.Auto`: the compiler propagates shardings from constraints.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = resolve_axis_sizes((data, fsdp, context), len(devices))
    # mesh_utils knows how a TPU slice is wired; elsewhere it keeps the order of the devices.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many pieces the mesh cuts a batch of samples."""
    count = 1
    for axis in BATCH_AXES:
        count *= mesh.shape[axis]
    return count
