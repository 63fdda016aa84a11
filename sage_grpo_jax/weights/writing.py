"""Writing a source of parameters as a model folder, in any format, in little memory."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from sage_grpo_jax.common import folders
from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.weights import configs, orbax_io, safetensors_io, tables
from sage_grpo_jax.weights.key_table import Path, Row, Shape, check_parameters
from sage_grpo_jax.weights.sources import Source, cast, pieces
from sage_grpo_jax.weights.tables import Config

FORMATS = (*tables.LAYOUTS, "orbax")
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
STEM = "diffusion_pytorch_model"


def write_model(
    path: str | os.PathLike,
    config: Config,
    source: Source,
    format: str,
    *,
    dtype: Any = np.float32,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes config.json and the weights; the folder appears whole or not at all.

    Args:
      path: the folder.
      config: of the model.
      source: of its parameters.
      format: one of `FORMATS`: "diffusers" (sharded where larger than `max_shard_size`), another
        layout that the model has (one file), or "orbax".
      dtype: of the written weights; rounding is to nearest, ties to even.
      max_shard_size: in bytes, for diffusers; None: one file.
      overwrite: an existing folder that we wrote is replaced.
      progress: is told of the bytes.

    Raises:
      ValueError: unknown format or dtype; parameters that do not fit the config; a folder that
        may not be replaced (`folders.check_target`); a config that the format cannot express;
        values that overflow in `dtype`.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {FORMATS}")
    dtype = np.dtype(dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype}: must be one of {list(DTYPES)}")
    layout = "diffusers" if format == "orbax" else format
    text = configs.to_json(config, layout)
    rows, shapes = tables.key_table(config, layout)
    _check_shapes(rows, shapes, source)
    progress = progress or Progress(0, None)
    with folders.new_folder(path, f"weights, {format}", overwrite=overwrite) as folder:
        (folder / configs.CONFIG_FILE).write_text(text)
        if format == "orbax":
            orbax_io.write(folder, source, dtype, progress)
        else:
            limit = max_shard_size if format == "diffusers" else None
            write_tensors(folder, STEM, rows, source, dtype, progress, max_shard_size=limit)


def write_tensors(
    folder: pathlib.Path,
    stem: str,
    rows: list[Row],
    source: Source,
    dtype: np.dtype,
    progress: Progress,
    *,
    max_shard_size: int | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes safetensors in another layout, one layer of one parameter at a time.

    Args:
      folder: an existing folder.
      stem: of the file names.
      rows: key table of the layout.
      source: of the parameters.
      dtype: of the file.
      progress: is told of the bytes.
      max_shard_size: in bytes; None: one file.
      metadata: for the headers.
    """
    shapes = {
        name: row.shape_there(source.shapes[row.ours]) for row in rows for name in row.names()
    }
    with safetensors_io.Writer(folder, stem, shapes, dtype, max_shard_size, metadata) as writer:
        for row in rows:
            indices = pieces(row.ours, source.shapes[row.ours])
            for name, index in zip(row.names(), indices, strict=True):
                layer = source.read(row.ours, index)
                first, values = row.to_theirs(layer if row.stacked is None else layer[0])
                progress.add(writer.write(name, cast(values, dtype, name), first), name)


def total_bytes(source: Source, dtype: Any) -> int:
    """Bytes of all parameters in a dtype."""
    counts = (int(np.prod(shape, dtype=np.int64)) for shape in source.shapes.values())
    return sum(counts) * np.dtype(dtype).itemsize


def _check_shapes(rows: list[Row], expected: dict[Path, Shape], source: Source) -> None:
    found = dict(source.shapes)
    check_parameters(rows, found)
    wrong = [f"{'/'.join(k)}: {found[k]} instead of {expected[k]}" for k in found
             if found[k] != expected[k]]  # fmt: skip
    if wrong:
        raise ValueError(f"parameters of the wrong shape: {', '.join(wrong)}")
