"""Pretrains the small video model of the moving-shapes world.

    python -m sage_grpo_jax.pretrain --config configs/moving_shapes_pretrain.py --workdir DIR

A rerun with the same workdir continues where the last one stopped. Settings are overridden with
`--config.section.field=value`, as in `--config.flow.steps=1000`.
"""

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from sage_grpo_jax.training import pretraining, pretraining_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and weights.")
_STAGES = flags.DEFINE_list(
    "stages", list(pretraining.STAGES), "Which stages to run; the default is all, in order."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"unexpected arguments: {' '.join(argv[1:])}")
    # The libraries underneath tell every detail of each save; --verbosity=0 shows it.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        config = pretraining_config.from_mapping(_CONFIG.value.to_dict())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    workdir = pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(_CONFIG.value.to_dict(), indent=2, default=str)
    (workdir / "config.json").write_text(settings + "\n")
    pretraining.run(config, workdir, _STAGES.value)


if __name__ == "__main__":
    app.run(main)
