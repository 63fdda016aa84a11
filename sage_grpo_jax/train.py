"""Trains a video generator by SAGE-GRPO.

    python -m sage_grpo_jax.train --config=configs/moving_shapes.py:method=sage --workdir=runs/a

Any field can be overridden: --config.rollout.eta=0.7. The same command with the same workdir goes
on from the newest checkpoint.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.checks import shadow, shadow_formulas
from sage_grpo_jax.common import command_line
from sage_grpo_jax.config import builder, devices
from sage_grpo_jax.rewards import types as reward_types
from sage_grpo_jax.training import loop, metrics, ratio, scoring

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Recipe, with an argument behind a colon.", lock_config=True
)
flags.mark_flag_as_required(_CONFIG)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


# What ends a run whose input is good; every one of them says what to do.
STOPPED = (
    loop.StorageError,
    loop.TooManySkipsError,
    ratio.NumericsError,
    scoring.RewardModelChangedError,
    reward_types.RewardServiceError,
)


def main() -> None:
    """Validates and trains."""
    config = builder.from_config_dict(_CONFIG.value)
    # The shadow knows some formulas only: refused now, not after the first step.
    if config.debug.shadow:
        shadow_formulas.check(config)

    # Devices before any other use of JAX.
    devices.start(config)
    metrics.log_versions()

    # The shadow is handed in, since training knows no room above it. None: stopped by a signal.
    summary = loop.train(config, pathlib.Path(_WORKDIR.value), shadow.Shadow)
    if summary is not None:
        print(f"done: {summary['steps']} steps; see {_WORKDIR.value}")


if __name__ == "__main__":
    command_line.run(main, stopped=STOPPED)
