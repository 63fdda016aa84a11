"""Evaluates a checkpoint, or the weights that a recipe starts from, on its fixed prompts and seeds.

    python -m sage_grpo_jax.evaluate --config=configs/moving_shapes.py --checkpoint=runs/a --out=e

Writes metrics.json and samples/ into --out. Without --checkpoint the recipe's own weights are used.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import (
    checkpoint,
    command_line,
    evaluation,
    metrics,
    scoring,
    setup,
)
from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import learner as learner_lib

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run; its newest checkpoint.")
_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)


def evaluate(config: config_lib.Config, source: str | None, out: pathlib.Path) -> dict[str, float]:
    """The metrics of an evaluation; see the module.

    Raises:
      ValueError, FileNotFoundError: bad input.
    """
    networks = setup.read_networks(config.model)
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh))
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        if source is None:
            trained = setup.fresh_state(networks, config, mesh).params
        else:
            abstract = setup.make_abstract_state(networks, config, mesh)
            trained = checkpoint.restore_params(source, abstract.params)
        prompts = setup.open_prompts(config, out, networks)
        scorer = stack.enter_context(scoring.open_scorer(config, out))
        learner = learner_lib.Learner(
            setup.build_programs(networks, config, mesh),
            setup.load_vae(networks, mesh),
            prompts.negative,
            scorer,
            mesh,
            base=setup.load_base(networks, config, mesh),
        )
        result = evaluation.evaluate(learner, trained, prompts.evaluation)
    evaluation.save_samples(result, out, "evaluation", config)
    metrics.write_json(out / "metrics.json", result.metrics)
    return result.metrics


def main(argv: list[str]) -> None:
    """Parses the flags and prints the metrics as JSON."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        config = config_lib.from_config_dict(_CONFIG.value)
        command_line.start_jax(config)
        found = evaluate(config, _CHECKPOINT.value, pathlib.Path(_OUT.value))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    app.run(main)
