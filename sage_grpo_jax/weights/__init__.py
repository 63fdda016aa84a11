"""Weights in the layouts of other codebases, in orbax checkpoints, and as adapters."""

from sage_grpo_jax.weights.adapters import load_adapters, open_adapters, save_adapters
from sage_grpo_jax.weights.configs import load_config
from sage_grpo_jax.weights.store import load, save

__all__ = ["load", "load_adapters", "load_config", "open_adapters", "save", "save_adapters"]
