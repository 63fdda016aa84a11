"""Entries as modules, for tests that call a function of one, and whole in this process."""

import contextlib
import importlib
import runpy
import sys
import types
from collections.abc import Iterator

from absl import flags

from sage_grpo_jax.common import command_line


def import_entry(name: str) -> types.ModuleType:
    """`sage_grpo_jax.NAME`, whose flags leave no trace: others parse theirs in this process."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"sage_grpo_jax.{name}")
    _forget_flags(name, before)
    return module


def run_entry(name: str, *arguments: str) -> None:
    """What `python -m sage_grpo_jax.NAME ARGUMENTS` does, in this process; leaves no flags either.

    Raises:
      SystemExit: flags that cannot be parsed.
      Exception: what the entry raises.
    """
    argv = sys.argv
    sys.argv = [name, *arguments]  # where recipes look for their overrides
    with _without_flags_of_entries():
        before = set(flags.FLAGS)
        try:
            entry = runpy.run_module(f"sage_grpo_jax.{name}")
            command_line.parse_flags(sys.argv)
            entry["main"]()
        finally:
            sys.argv = argv
            _forget_flags(name, before)


@contextlib.contextmanager
def _without_flags_of_entries() -> Iterator[None]:
    """Entries that other tests have imported may have flags of the same names."""
    aside = {}
    for flag in list(flags.FLAGS):
        module = flags.FLAGS.find_module_defining_flag(flag)
        if module.startswith("sage_grpo_jax."):
            aside[flag] = module, flags.FLAGS[flag]
            delattr(flags.FLAGS, flag)
    try:
        yield
    finally:
        for flag, (module, value) in aside.items():
            flags.FLAGS[flag] = value
            flags.FLAGS.register_flag_by_module(module, value)


def _forget_flags(name: str, before: set[str]) -> None:
    """Those of the entry and its recipe; libraries that were imported for it keep their own."""
    own = (f"sage_grpo_jax.{name}", runpy.__name__)
    for flag in set(flags.FLAGS) - before:
        module = flags.FLAGS.find_module_defining_flag(flag)
        if flag.partition(".")[0] == "config" or module in own:
            delattr(flags.FLAGS, flag)
