"""The programs of a step compile for a TPU slice, on a machine without one."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_recipe import TRANSFORMER

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video

pytest.importorskip("libtpu", reason="the [tpu] and [dev] extras bring libtpu")

# Heads as wide as a TPU's vector: those of the splash kernel.
WIDE = dataclasses.replace(
    TRANSFORMER, attention_head_dim=128, num_layers=1, rope_axes_dim=(16, 56, 56)
)

SCRIPT = """
import sys, jax, numpy as np
from jax.experimental import topologies
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.checks import compile_checks
from sage_grpo_jax.config import builder, schema

topology = topologies.get_topology_desc(topology_name="v6e:2x4", platform="tpu")
config = schema.default_config()
config.update_from_flattened_dict(eval(sys.argv[1]))
config = builder.from_config_dict(config)
mesh = mesh_lib.make_mesh(2, 2, 2, devices=topology.devices)
for name, lowered in compile_checks.lower_programs(config, mesh).items():
    text = lowered.as_text()
    # A mesh that does not reach the model would silently drop its constraints.
    if name != "decode":
        assert "sharding_constraint" in text, name
        assert "splash" in text, name
    print("compiled", name, lowered.compile().memory_analysis().temp_size_in_bytes)
"""


# Each reference of the KL costs as much compilation as the forward pass.
@pytest.mark.parametrize("kind", ["none", pytest.param("moving", marks=pytest.mark.slow)])
def test_rollout_decode_and_update_compile_for_v6e_8(tiny_overrides, tmp_path, kind):
    """In bfloat16, with the kernels that a full-size run has."""
    params = jax.eval_shape(lambda key: hunyuan_video.init_params(WIDE, key), jax.random.key(0))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), params)
    weights.save(zeros, tmp_path / "transformer", config=WIDE)
    overrides = {
        **tiny_overrides,
        "model.transformer": str(tmp_path / "transformer"),
        "model.compute_dtype": "bfloat16",
        "trust_region.kind": kind,
        "trust_region.reference_dtype": "bfloat16",
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.context": 2,
    }
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # libtpu refuses flags that only the CPU compiler knows
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so several may compile at once
        "TPU_ACCELERATOR_TYPE": "v6e-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }

    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, repr(overrides)],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("rollout", "decode", "update"):
        assert f"compiled {name}" in result.stdout
