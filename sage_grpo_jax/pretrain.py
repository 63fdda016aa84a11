"""Pretrains the small video model of the moving-shapes world.

    python -m sage_grpo_jax.pretrain --config configs/moving_shapes_pretrain.py --workdir DIR

A rerun with the same workdir continues where the last one stopped. Settings are overridden with
`--config.section.field=value`, as in `--config.flow.steps=1000`.
"""

import functools
import json
import pathlib

from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.common import command_line, files
from sage_grpo_jax.pretraining import run as pretraining
from sage_grpo_jax.pretraining import settings as pretraining_config
from sage_grpo_jax.training import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and weights.")
_STAGES = flags.DEFINE_list(
    "stages", list(pretraining.STAGES), f"Some of {', '.join(pretraining.STAGES)}; default: all."
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """Writes config.json and runs the stages."""
    config = pretraining_config.from_mapping(_CONFIG.value.to_dict())
    workdir = pathlib.Path(_WORKDIR.value)

    # A folder from before there were manifests is known by its config.
    file = workdir / "config.json"
    ours = functools.partial(workdir_lib.is_config, file)
    workdir_lib.make_folder(workdir, "--workdir", pretraining.NAMES, "a pretraining", ours)

    settings = json.dumps(_CONFIG.value.to_dict(), indent=2, default=str)
    files.write_atomically(file, f"{settings}\n".encode())
    pretraining.run(config, workdir, _STAGES.value)


if __name__ == "__main__":
    command_line.run(main, stopped=(FloatingPointError,))
