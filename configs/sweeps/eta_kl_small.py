"""A corner of eta_kl.py that a laptop finishes in a quarter of an hour: two etas, with and without
the trust region, two seeds, 12 steps.

    python -m sage_grpo_jax.sweep --config=configs/sweeps/eta_kl_small.py --workdir=runs/small
"""

import pathlib

from sage_grpo_jax.experiments import sweeps

_BASE = sweeps.load_module(pathlib.Path(__file__).parent.parent / "moving_shapes.py")


def get_config(arg: str | None = None):
    """The recipe, shortened."""
    config = _BASE.get_config(arg)
    config.num_steps = 12
    config.optimizer.learning_rate = 1e-4
    config.trust_region.warmup_steps = 4
    config.eval.num_prompts = 64
    config.checkpoint.every = 12
    return config


def sweep(add) -> None:
    """Every eta with and without the trust region, for two seeds."""
    axes = {"rollout.eta": (0.3, 0.6), "trust_region.kind": ("none", "dual"), "seed": (0, 1)}
    for point in sweeps.product(axes):
        add(point)
