"""Loading and saving weights in the layouts of other codebases."""

from sage_grpo_jax.weights.diffusers import load, load_config, save

__all__ = ["load", "load_config", "save"]
