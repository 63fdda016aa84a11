"""What several processes need: arrays from host data, host data from arrays, agreement."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sage_grpo_jax.common import termination


def initialize() -> None:
    """Joins the other processes of a TPU slice or cluster, where there are any.

    To be called before any other use of JAX; a single process has nothing to join. TPU slices and
    the clusters that JAX knows tell their size themselves; elsewhere JAX_COORDINATOR_ADDRESS
    (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      ValueError: one of the variables is not a number, or they contradict each other.
    """
    # The size of a cluster comes from a person, or from the environment of TPU workers.
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        count, index = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=count, process_id=index)
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") and jax.config.jax_platforms != "cpu":
        jax.distributed.initialize()
    # The service of JAX has taken SIGTERM by now.
    termination.renew()


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise ValueError(f"{name}: got {text!r}; allowed: a whole number")
    return None if text is None else int(text)


def to_global(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Puts a tree of arrays, equal on every process, onto the devices of `sharding`.

    Leaves are numpy arrays, or typed keys that every process has as a whole.
    """

    def put(array: np.ndarray | jax.Array) -> jax.Array:
        # Keys have no numpy form: their bits travel, and become keys again on the devices.
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            data, implementation = jax.random.key_data(array), jax.random.key_impl(array)
            return jax.random.wrap_key_data(put(data), impl=implementation)
        array = np.asarray(array)
        # JAX asks only for what the devices of this process hold.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def local_rows(array: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """(row, value) for every row of axis 0 that this process owns.

    A row that several devices hold is owned by exactly one of them (replica 0), so over all
    processes each row comes once.
    """
    for shard in array.addressable_shards:
        if shard.replica_id != 0:
            continue
        start = shard.index[0].start or 0
        for offset, value in enumerate(np.asarray(shard.data)):
            yield start + offset, value


def gather_rows(values: np.ndarray, owned: np.ndarray) -> np.ndarray:
    """Rows from whichever process owns them, equal on every process afterwards.

    Args:
      values: [rows, ...]; only the rows in `owned` mean anything here.
      owned: bool [rows].

    Raises:
      RuntimeError: a row has no owner.
    """
    # Every process must come here, also one that owns no row: the gather waits for all of them.
    if jax.process_count() > 1:
        all_values = multihost_utils.process_allgather(values)
        all_owned = multihost_utils.process_allgather(owned)
        values, owned = np.array(values), np.zeros_like(owned)
        for theirs, mask in zip(all_values, all_owned, strict=True):
            values[mask] = theirs[mask]
            owned |= mask
    if not owned.all():
        raise RuntimeError(f"no process owns the rows {np.flatnonzero(~owned).tolist()}")
    return values


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def agree(flag: bool) -> bool:
    """True on every process when it is true on any of them."""
    # A host that decides alone (a signal, a file that it cannot read) would leave the others
    # waiting in the next collective.
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
