"""How entries begin: flags (a mistake ends with one line and exit status 2), then devices."""

import dataclasses
import sys
from collections.abc import Sequence

from absl import flags

from sage_grpo_jax.parallel import cpu_devices, hosts
from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import recipe


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses as absl does, for `app.run(main, flags_parser=parse_flags)`.

    absl itself prints a trace for an unknown config field or a recipe that refuses its argument.
    """
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a recipe is code: it may raise anything
        print(f"error: {_reason(error)}", file=sys.stderr)
        sys.exit(2)


def _reason(error: BaseException) -> str:
    """The innermost message, in one line: the outer ones hold traces."""
    if isinstance(error, flags.Error) and error.__cause__ is None and error.__context__ is None:
        return one_line(error)
    cause = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__
    text = one_line(cause)
    if isinstance(cause, AttributeError | KeyError):
        return f"unknown config field: {text.strip(chr(34))}"
    # The outer message names the flag, where it is one of a field.
    outer = one_line(error)
    is_field = outer.startswith("flag --config.")
    return outer if is_field and "Traceback" not in outer else text


def start_jax(config: config_lib.Config) -> None:
    """Provides the devices of a run, before any other use of JAX."""
    sizes = dataclasses.astuple(config.mesh)
    cpu_devices.divide(sizes, lambda shards: recipe.fits(config, shards))
    hosts.initialize()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
