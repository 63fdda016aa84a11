r"""Converts weights between diffusers, other codebases, orbax checkpoints and adapters (peft).

    python -m sage_grpo_jax.convert --src=ckpts/transformer/480p_t2v --src_format=tencent \
        --dst=weights/480p_t2v --dst_format=orbax
    python -m sage_grpo_jax.convert --src=runs/a --src_format=orbax \
        --dst=tuned --dst_format=diffusers

--src may be a model folder, a file, or (orbax) the workdir of a training run. Runs on the CPU, in
the memory of the largest parameter. See docs/weights.md.
"""

import pathlib
import sys

import jax
from absl import flags, logging

from sage_grpo_jax.common import command_line
from sage_grpo_jax.policy import networks
from sage_grpo_jax.training import checkpoint
from sage_grpo_jax.weights import conversion
from sage_grpo_jax.weights.formats import orbax_io

_SRC = flags.DEFINE_string("src", None, "Folder or file to read.", required=True)
_SRC_FORMAT = flags.DEFINE_string(
    "src_format", None, f"One of {', '.join(conversion.FORMATS)}.", required=True
)
_DST = flags.DEFINE_string("dst", None, "Folder to write.", required=True)
_DST_FORMAT = flags.DEFINE_string(
    "dst_format", None, f"One of {', '.join(conversion.FORMATS)}.", required=True
)
_DTYPE = flags.DEFINE_string("dtype", "float32", f"One of {', '.join(conversion.DTYPES)}.")
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "10GB", "Largest file (diffusers).")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a --dst that we wrote.")
_SRC_KEY = flags.DEFINE_string(
    "src_key",
    None,
    "module or ema: which weights of a training checkpoint or run that holds both.",
)
_CONFIG_JSON = flags.DEFINE_string("config_json", None, "A config, where --src has none.")
_BASE = flags.DEFINE_string("base", None, "Weights that adapters are merged into.")


def make_job() -> conversion.Job:
    """The job that the flags describe.

    Raises:
      ValueError: bad input.
    """
    # --src may be a run: its newest checkpoint is meant, and its workdir tells of what model.
    src, step = pathlib.Path(_SRC.value), None
    if _SRC_FORMAT.value == "orbax" and not orbax_io.is_orbax(src):
        src, step = _find_run(src)
    return conversion.Job(
        src=src,
        src_format=_SRC_FORMAT.value,
        dst=pathlib.Path(_DST.value),
        dst_format=_DST_FORMAT.value,
        dtype=_DTYPE.value,
        max_shard_size=_MAX_SHARD_SIZE.value,
        overwrite=_OVERWRITE.value,
        src_key=_SRC_KEY.value,
        config_json=None if _CONFIG_JSON.value is None else pathlib.Path(_CONFIG_JSON.value),
        base=None if _BASE.value is None else networks.resolve_path(_BASE.value),
        run_step=step,
        find_base=networks.resolve_path,
    )


def _find_run(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """(workdir, newest checkpoint) from a workdir or its folder of checkpoints."""
    # The config and the adapters' description lie in the workdir, one folder above.
    if path.name == checkpoint.FOLDER:
        path = path.parent
    folder = path / checkpoint.FOLDER
    if not folder.is_dir():
        raise ValueError(
            f"src={path}: neither a folder with config.json and {orbax_io.PARAMS}/, nor the "
            f"workdir of a run with {checkpoint.FOLDER}/"
        )
    return path, orbax_io.latest_checkpoint(folder)


def main() -> None:
    """Converts, and says what was written."""
    # Nothing is computed, and an accelerator may be busy with a run.
    jax.config.update("jax_platforms", "cpu")
    written = conversion.convert(make_job(), sys.stderr)
    print(f"done: {written}; see {_DST.value}")


if __name__ == "__main__":
    command_line.run(main, verbosity=logging.ERROR)
