r"""Samples videos from converted weights or from a training run.

    python -m sage_grpo_jax.sample --config=configs/moving_shapes.py \
        --weights=asset:moving_shapes/transformer --prompts=prompts.txt --out=clips

What is not given comes from the recipe. The same command goes on where it was stopped.
"""

import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.common import command_line
from sage_grpo_jax.config import builder
from sage_grpo_jax.flow import kinds
from sage_grpo_jax.parallel import hosts
from sage_grpo_jax.sampling import run, sources
from sage_grpo_jax.sampling import settings as settings_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Recipe, with an argument behind a colon.", lock_config=True
)
flags.mark_flag_as_required(_CONFIG)
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "Folder of the transformer (diffusers, tencent, orbax); default: the recipe's."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run; its newest checkpoint.")
_EMA = flags.DEFINE_bool("ema", False, "The moving average of the run (config.ema.decay).")
_ADAPTERS = flags.DEFINE_string("adapters", None, "Folder of LoRA adapters for the weights.")
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "Embedding cache of encode_prompts; for the small model .txt, .csv or .jsonl.",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder of the clips.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds, a clip of every prompt for each.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Samples at a time, on all devices.")
# Values of `sampling.settings` by name; None leaves the recipe's.
_SETTINGS = {
    "sampler": flags.DEFINE_string("sampler", None, f"{', '.join(kinds.KINDS)}; default: ode."),
    "steps": flags.DEFINE_integer("steps", None, "Denoising steps."),
    "shift": flags.DEFINE_float("shift", None, "Shift of the noise schedule."),
    "guidance": flags.DEFINE_float("guidance", None, "Classifier-free guidance; 1: without."),
    "eta": flags.DEFINE_float("eta", None, "Noise level of stochastic samplers."),
    "frames": flags.DEFINE_integer("frames", None, "Frames of a clip."),
    "height": flags.DEFINE_integer("height", None, "Pixels."),
    "width": flags.DEFINE_integer("width", None, "Pixels."),
    "format": flags.DEFINE_string("format", None, "mp4, gif or both; default: mp4."),
    "tiling": flags.DEFINE_string(
        "tiling",
        None,
        "Tiles of the VAE: off, official, diffusers, or auto: official above 256 pixels.",
    ),
}


def main() -> None:
    """Samples, and says how many clips were made."""
    config = builder.from_config_dict(_CONFIG.value)
    request = run.Request(
        source=sources.Source(_WEIGHTS.value, _CHECKPOINT.value, _ADAPTERS.value, _EMA.value),
        prompts=_PROMPTS.value,
        out=pathlib.Path(_OUT.value),
        seeds=settings_lib.parse_seeds(_SEEDS.value),
        batch_size=_BATCH_SIZE.value,
        overrides={name: flag.value for name, flag in _SETTINGS.items()},
    )
    # Before JAX is used, and after the flags: a bad one is told without waiting for the others.
    hosts.initialize()
    made = run.sample(config, request)
    if jax.process_index() == 0:
        print(f"done: {made} videos; see {_OUT.value}")


if __name__ == "__main__":
    command_line.run(main)
