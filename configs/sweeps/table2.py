"""Table 2 of the paper on the moving shapes: sampler x penalty x reward setting x seeds.

    python -m sage_grpo_jax.sweep --config=configs/sweeps/table2.py --workdir=runs/table2 --plan

A row is one sampler with one penalty, in the loop of `sage` (as in the paper, whose baselines are
samplers in its own code). Every row names every number of its penalty, so that `fixed` is the same
in all of them. 54 runs of about 5 minutes on two CPU cores.
"""

import pathlib

from sage_grpo_jax.experiments import sweeps

_BASE = sweeps.load_module(pathlib.Path(__file__).parent.parent / "moving_shapes.py")

SEEDS = (0, 1, 2)
# The weights of VQ, MQ and TA.
SETTINGS = {"B": (0.5, 0.5, 1.0), "A": (1.0, 1.0, 1.0)}
# Penalty -> its numbers; what a kind does not read is named all the same.
_LAMBDA = {
    "trust_region.fixed_weight": 0.04,  # of `fixed`, for the whole run
    "trust_region.initial_weight": 0.01,  # of `dual`, and the five below
    "trust_region.final_weight": 0.1,
    "trust_region.warmup_steps": 20.0,
    "trust_region.min_weight": 1e-3,
    "trust_region.max_weight": 30.0,
    "trust_region.target_shift": 0.02,
    "trust_region.feedback": "tighten",
    "trust_region.kl_time_weight": "uniform",
}
PENALTIES = {kind: {"trust_region.kind": kind, **_LAMBDA} for kind in ("none", "fixed", "dual")}
# (sampler, penalty), in the order of the table.
ROWS = (
    *((sampler, penalty) for sampler in ("dance", "flow", "cps") for penalty in ("none", "fixed")),
    *(("precise", penalty) for penalty in PENALTIES),
)


def get_config(arg: str | None = None):
    """The recipe that the points override."""
    return _BASE.get_config(arg)


def sweep(add) -> None:
    """Every row in both settings, for every seed."""
    for weights in SETTINGS.values():
        setting = {
            f"rewards.weights.{name}": weight
            for name, weight in zip(("VQ", "MQ", "TA"), weights, strict=True)
        }
        for sampler, penalty in ROWS:
            for seed in SEEDS:
                add({"rollout.sde": sampler, **PENALTIES[penalty], **setting, "seed": seed})
