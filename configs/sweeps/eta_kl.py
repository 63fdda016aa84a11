"""Exploration against trust region: eta x bounds of the KL weight x KL kind x seeds.

    python -m sage_grpo_jax.sweep --config=configs/sweeps/eta_kl.py --workdir=runs/eta_kl --plan

On the moving shapes, 45 runs of about 5 minutes on two CPU cores. A smaller one:
--config.num_steps=20 --config.eval.num_prompts=32.
"""

import pathlib

from sage_grpo_jax.experiments import sweeps

_BASE = sweeps.load_module(pathlib.Path(__file__).parent.parent / "moving_shapes.py")

ETAS = (0.3, 0.5, 0.7)
SEEDS = (0, 1, 2)
# (kind, lower and upper bound of the weight)
TRUST_REGIONS = (
    ("none", 1e-3, 30.0),
    ("moving", 1e-3, 30.0),
    ("dual", 1e-3, 0.1),
    ("dual", 1e-3, 30.0),
    ("dual", 0.1, 100.0),
)


def get_config(arg: str | None = None):
    """The recipe that the points override."""
    return _BASE.get_config(arg)


def sweep(add) -> None:
    """Every eta with every trust region and seed."""
    for eta in ETAS:
        for kind, low, high in TRUST_REGIONS:
            for seed in SEEDS:
                add(
                    {
                        "rollout.eta": eta,
                        "trust_region.kind": kind,
                        "trust_region.min_weight": low,
                        "trust_region.max_weight": high,
                        "seed": seed,
                    }
                )
