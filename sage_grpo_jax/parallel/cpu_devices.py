"""CPU cores as devices of the mesh.

XLA runs the operations of one CPU device one after another and finds parallelism only inside of
them; small ones run on one thread while the other cores wait. With a device per core each core has
a program of its own: docs/speed.md has the measurement.
"""

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Sequence

import jax

from sage_grpo_jax.parallel import mesh as mesh_lib

_COUNT_FLAG = "--xla_force_host_platform_device_count"
# Devices wait for each other in a sum over all of them; XLA takes 40 seconds of it for a deadlock
# and aborts. A process that was stopped for a while and goes on is none.
_PATIENCE = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)


def divide(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Gives JAX as many CPU devices as the mesh asks for; with -1 in it, up to one for each core.

    To be called before any other use of JAX. Does nothing where there may be another platform
    (`JAX_PLATFORMS=cpu` says that there is none), in a cluster, where XLA_FLAGS already hold a
    number of devices, and for sizes that no mesh has.

    Args:
      sizes: of the axes data, fsdp and context, as in `mesh.make_mesh`.
      fits: whether the batches of the run can be cut into so many pieces.

    Returns:
      The number of devices; None: left alone.
    """
    # XLA reads its flags once, when the first backend starts: afterwards this would do nothing.
    given = os.environ.get("XLA_FLAGS", "")
    if _COUNT_FLAG in given or "JAX_COORDINATOR_ADDRESS" in os.environ or not _only_cpu():
        return None
    cores = available_cores()
    count = choose(sizes, cores, fits)
    if count is None:
        return None

    flags = [given, f"{_COUNT_FLAG}={count}", *_PATIENCE]
    if count == cores > 1:
        # Every core has its own program: threads inside of operations would only get in the way.
        flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    return count


def choose(sizes: Sequence[int], cores: int, fits: Callable[[int], bool]) -> int | None:
    """The number of devices for a mesh; None if no number makes it one.

    Args:
      sizes: devices along data, fsdp and context; at most one of them -1.
      cores: a size of -1 takes no more devices than there are cores, but at least one.
      fits: whether batches can be cut into so many pieces.
    """
    known = math.prod(size for size in sizes if size != -1)
    if len(sizes) != len(mesh_lib.AXES) or known < 1 or list(sizes).count(-1) > 1:
        return None
    if -1 not in sizes:
        return known
    open_axis = mesh_lib.AXES[list(sizes).index(-1)]
    if open_axis not in mesh_lib.BATCH_AXES:
        return known  # what divides a batch says nothing about the tokens

    # The largest number of devices whose shares of a batch come out even
    context = sizes[mesh_lib.AXES.index("context")]
    for factor in range(max(cores // known, 1), 1, -1):
        if fits(known * factor // context):
            return known * factor
    return known


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _only_cpu() -> bool:
    """Whether JAX will find no accelerator; without starting its backends."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    # An accelerator comes as a plugin or as libtpu; asking JAX itself would start its backends.
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
