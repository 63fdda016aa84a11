"""Trains a video generator by SAGE-GRPO.

    python -m sage_grpo_jax.train --config=configs/moving_shapes.py:method=sage --workdir=runs/a

Any field can be overridden: --config.rollout.eta=0.7. The same command with the same workdir goes
on from the newest checkpoint.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from sage_grpo_jax.rewards import types as reward_types
from sage_grpo_jax.training import command_line, learner, loop, metrics
from sage_grpo_jax.training import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Recipe, with an argument behind a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


def main(argv: list[str]) -> None:
    """Parses, validates, trains; bad input ends with one line and exit status 2."""
    if len(argv) > 1:
        sys.exit(f"unexpected arguments: {' '.join(argv[1:])}")
    # The libraries underneath tell every detail of each save; --verbosity=0 shows it.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        if _CONFIG.value is None:
            raise ValueError("--config: missing; allowed: a recipe, as in configs/moving_shapes.py")
        config = config_lib.from_config_dict(_CONFIG.value)
        command_line.start_jax(config)
        metrics.log_versions()
        summary = loop.train(config, pathlib.Path(_WORKDIR.value))
    except (ValueError, OSError) as error:
        if logging.level_debug():
            raise
        print(f"error: {command_line.one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (
        loop.StorageError,
        loop.TooManySkipsError,
        learner.NumericsError,
        learner.RewardModelChangedError,
        reward_types.RewardServiceError,
    ) as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
    if summary is not None:
        print(f"done: {summary['steps']} steps; see {_WORKDIR.value}")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
