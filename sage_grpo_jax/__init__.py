"""SAGE-GRPO in JAX: reinforcement learning for flow-matching video generators."""
