"""Cores as devices: how many, and when JAX is left alone."""

import os
import subprocess
import sys

import pytest

from sage_grpo_jax.parallel import cpu_devices


def of_64(shards: int) -> bool:
    return 64 % shards == 0


@pytest.mark.parametrize(
    ("sizes", "cores", "expected"),
    [
        ((-1, 1, 1), 2, 2),
        ((1, -1, 1), 8, 8),
        ((-1, 1, 1), 6, 4),  # 64 samples in 6 or 5 pieces do not come out even
        ((-1, 1, 1), 1, 1),
        ((-1, 2, 1), 8, 8),
        ((-1, 2, 1), 1, 2),  # what the mesh asks for, it gets
        ((-1, 1, 2), 8, 8),
        ((-1, 1, 2), 7, 4),  # 3 x 2 devices would cut the samples in 3
        ((1, 1, -1), 8, 1),
        ((2, 2, 2), 2, 8),
        ((-1, -1, 1), 8, None),
        ((0, 1, 1), 8, None),
        ((-2, 1, 1), 8, None),
    ],
)
def test_choice(sizes, cores, expected):
    assert cpu_devices.choose(sizes, cores, of_64) == expected


def test_what_somebody_chose_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert cpu_devices.divide((-1, 1, 1), of_64) is None
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=3"
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    assert cpu_devices.divide((-1, 1, 1), of_64) is None


@pytest.mark.parametrize(("cores", "threads"), [(3, True), (2, False)])
def test_flags(monkeypatch, cores, threads):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setattr(cpu_devices, "available_cores", lambda: cores)
    assert cpu_devices.divide((-1, 1, 1), of_64) == 2
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == [
        "--xla_cpu_enable_fast_math=false",
        "--xla_force_host_platform_device_count=2",
    ]
    # A third core has no program of its own: it helps inside of the others' operations.
    assert ("--xla_cpu_multi_thread_eigen=false" in flags) is not threads


def test_jax_takes_the_flags():
    """In a process of its own: here the devices are there already."""
    program = """
import jax
from sage_grpo_jax.parallel import cpu_devices
cpu_devices.available_cores = lambda: 5
assert cpu_devices.divide((-1, 1, 1), lambda n: n != 5) == 4
assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("a",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
assert float(jax.device_put(jax.numpy.arange(8.0), rows).sum()) == 28
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "XLA_FLAGS": ""})
