"""Entries as modules, for tests that call a function of one."""

import importlib
import types

from absl import flags


def import_entry(name: str) -> types.ModuleType:
    """`sage_grpo_jax.NAME`, whose flags leave no trace: others parse theirs in this process."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"sage_grpo_jax.{name}")
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
    return module
