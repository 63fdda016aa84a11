"""The devices of a run, provided before any other use of JAX."""

import dataclasses

from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import schema
from sage_grpo_jax.parallel import cpu_devices, hosts


def start(config: schema.Config) -> None:
    """Divides a CPU into devices that the batches of a recipe fit, and joins other processes."""
    sizes = dataclasses.astuple(config.mesh)
    cpu_devices.divide(sizes, lambda shards: plan_lib.fits(config, shards))
    hosts.initialize()
