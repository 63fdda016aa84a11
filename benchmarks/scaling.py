"""Prints docs/scaling.md's tables: gigabytes of training state on each device, by slice size.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --recipe=configs/wan_21.py:variant=1.3B --devices=1,4,8,16

Shapes and shardings are those of the programs (`training.blueprint`); nothing is allocated.
Activations, gathered layers and the buffers of the compiler come on top.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import jax
import ml_collections

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.experiments import sweeps
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training.blueprint import Blueprint

RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "hunyuan_video_15.py"
DEVICES = "4,8,16,32,64,128"
ROWS = {
    "full, AdamW, dual": {},
    "full, AdamW, fixed or moving": {"trust_region.kind": "moving"},
    "full, AdamW, no KL": {"trust_region.kind": "none"},
    "full, Muon, dual": {"optimizer.name": "muon"},
    "LoRA r 64, dual": {"lora.rank": 64},
}


def bytes_per_device(config: schema.Config, devices: int) -> int:
    """Of parameters, gradients, optimizer, trust region, and the frozen base with adapters."""
    # A mesh without devices: sizes of any slice on any machine.
    mesh = jax.sharding.AbstractMesh((1, devices, 1), mesh_lib.AXES)
    blueprint = Blueprint.describe(config, mesh)
    state, base = blueprint.state, blueprint.base
    # The gradient is as large as the parameters.
    held = [state, state.params, base]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(held)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--devices", default=DEVICES)
    flags = parser.parse_args()
    file, _, arg = flags.recipe.partition(":")
    devices = [int(count) for count in flags.devices.split(",")]

    print("| state | " + " | ".join(f"{n} devices" for n in devices) + " |")
    print("|---" * (len(devices) + 1) + "|")
    recipe = sweeps.load_module(pathlib.Path(file))
    for name, overrides in ROWS.items():
        # A fresh config for each row: overrides stay where they were put.
        config: ml_collections.ConfigDict = recipe.get_config(arg or None)
        config.update_from_flattened_dict(overrides)
        validated = builder.from_config_dict(config)
        sizes = [bytes_per_device(validated, n) / 1e9 for n in devices]
        print(f"| {name} | " + " | ".join(f"{size:.1f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
