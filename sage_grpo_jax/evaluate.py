"""Evaluates a checkpoint, or the weights that a recipe starts from, on its fixed prompts and seeds.

    python -m sage_grpo_jax.evaluate --config=configs/moving_shapes.py --checkpoint=runs/a --out=e

Writes metrics.json and samples/ into --out. Without --checkpoint the recipe's own weights are used;
--split=test takes the prompts that results are reported on, --ema the moving average of the run's
parameters.
"""

import contextlib
import json
import pathlib
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.common import command_line, folders
from sage_grpo_jax.config import builder, devices, schema
from sage_grpo_jax.rewards import types as reward_types
from sage_grpo_jax.training import (
    checkpoint,
    evaluation,
    input_checks,
    loop,
    metrics,
    programs,
    reward_service,
)
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Recipe, with an argument behind a colon.", lock_config=True
)
flags.mark_flag_as_required(_CONFIG)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run; its newest checkpoint.")
_SPLIT = flags.DEFINE_enum(
    "split", "eval", ["eval", "test"], "config.data.eval_prompts or config.data.test_prompts."
)
_EMA = flags.DEFINE_bool("ema", False, "The moving average of the run (config.ema.decay).")
_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
_NAMES = (
    "metrics.json",
    *(f"samples/evaluation.{kind}" for kind in ("png", "gif", "json")),
    "embeddings/*",
)


def evaluate(
    config: schema.Config,
    source: str | None,
    out: pathlib.Path,
    split: str = "eval",
    ema: bool = False,
) -> dict[str, float]:
    """The metrics of an evaluation; see the module.

    Raises:
      ValueError: bad input, before anything is loaded.
      loop.StorageError: see `input_checks.open_prompts`.
      RewardServiceError: see `reward_service.open_scorer`.
    """
    # What can be refused without loading anything.
    if split == "test" and not config.data.test_prompts:
        raise ValueError("--split: got test, but config.data.test_prompts is ''; allowed: eval")
    if ema and source is None:
        raise ValueError("--ema: without --checkpoint there is no average; allowed: both")
    blueprint = input_checks.check(config)
    workdir_lib.make_folder(out, "--out", _NAMES, "an evaluation")

    # Prompts, and the policy: the recipe's weights, or a run's, whose encoder made the prompts.
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(blueprint.mesh))
        prompts = input_checks.open_prompts(config, out, blueprint.networks)
        if source is None:
            trained = blueprint.fresh_state().params
        else:
            what = f"config.data.eval_prompts: {config.data.eval_prompts}"
            workdir_lib.check_encoder(prompts.encoder, what, pathlib.Path(source))
            trained = _restore(source, blueprint.state.params, ema)

        # The learner of training, of which no step is taken.
        scorer = stack.enter_context(reward_service.open_scorer(config, out))
        learner = learner_lib.Learner(
            programs.build(blueprint),
            blueprint.load_vae(),
            prompts.negative,
            scorer,
            base=blueprint.load_base(),
        )
        chosen = prompts.evaluation if split == "eval" else prompts.test
        result = evaluation.evaluate(learner, trained, chosen, split)

    if jax.process_index() == 0:
        # Process 0 has the metrics of all.
        evaluation.save_samples(result, out, "evaluation", config)
        metrics.write_json(out / "metrics.json", result.metrics)
        folders.settle(out, _NAMES)
    return result.metrics


def _restore(source: str, abstract: Any, ema: bool) -> Any:
    try:
        return checkpoint.restore_params(source, abstract, ema)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--checkpoint: {error}") from error


def main() -> None:
    """Prints the metrics as JSON."""
    config = builder.from_config_dict(_CONFIG.value)
    # Before anything else asks JAX for its devices.
    devices.start(config)
    out = pathlib.Path(_OUT.value)
    found = evaluate(config, _CHECKPOINT.value, out, _SPLIT.value, _EMA.value)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    command_line.run(main, stopped=(loop.StorageError, reward_types.RewardServiceError))
