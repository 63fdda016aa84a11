"""Model folders: parameters read and written, whatever the format, in little memory."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sage_grpo_jax.common import folders
from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.weights import configs, layouts
from sage_grpo_jax.weights.formats import orbax_io, safetensors_io, tensor_files
from sage_grpo_jax.weights.formats.source import Path, Shape, Source, cast, pieces
from sage_grpo_jax.weights.layouts import Config
from sage_grpo_jax.weights.sources import FiniteSource, TensorSource, TreeSource, to_devices
from sage_grpo_jax.weights.tables.key_table import Row, check_parameters

FORMATS = (*layouts.NAMES, "orbax")
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
STEM = "diffusion_pytorch_model"


def load(
    path: str | os.PathLike,
    config: Config,
    shardings: Any = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, Any]:
    """Parameters from a folder or file in one of the model's layouts or our orbax format.

    Args:
      path: a folder, or one file of tensors; the format is recognised.
      config: decides model and key table.
      shardings: tree of `jax.sharding.Sharding` like the parameters: each host then reads only the
        slices that its devices hold. None: default device.
      dtype: of the parameters; values are cast while they are read.

    Raises:
      ValueError: unreadable files; a config that does not fit the tensors; tensors missing,
        unexpected or misshapen (all are named); values that are not finite.
    """
    return to_devices(FiniteSource(open_source(path, config), path), shardings, dtype)


def open_source(
    path: str | os.PathLike,
    config: Config,
    format: str | None = None,
    src_key: str | None = None,
    config_name: str = "config.json",
) -> Source:
    """The parameters of a model, to be read by slices; headers only are read here.

    Args:
      path: a folder, or one file of tensors.
      config: of the model; checked against what is there.
      format: one of `FORMATS`; None recognises it.
      src_key: which of several nested dictionaries to read ("module", "ema").
      config_name: what messages call the config.

    Raises:
      ValueError: as of `load`.
    """
    path = pathlib.Path(path)
    if format == "orbax" or (format is None and orbax_io.is_orbax(path)):
        return _open_orbax(path, config)

    # The headers tell all that is checked; no value is read here.
    tensors = tensor_files.open_tensors(path, src_key)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if format is None:
        kind = layouts.recognise(shapes)
        format = "diffusers" if kind is None else kind.layout

    try:
        configs.check_config(config, format, shapes, config_name)
        return TensorSource(*layouts.key_table(config, format), tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _open_orbax(path: pathlib.Path, config: Config) -> Source:
    if not orbax_io.is_orbax(path):
        raise ValueError(f"path={path}: no folder with config.json and {orbax_io.PARAMS}/")
    source = orbax_io.OrbaxSource(path / orbax_io.PARAMS)
    check_tree(source, layouts.parameter_shapes(config), path / configs.CONFIG_FILE)
    return source


def check_tree(source: Source, expected: Mapping[Path, Shape], file: pathlib.Path) -> None:
    """Checks that the parameters are those that the config in a file asks for.

    Args:
      source: of the parameters.
      expected: the shape of each parameter, by path.
      file: that holds the config, for messages.

    Raises:
      ValueError: lists parameters missing, unexpected and of another shape.
    """
    found = source.shapes
    problems = {
        "missing": [k for k in expected if k not in found],
        "unexpected": [k for k in found if k not in expected],
        "of another shape": [k for k in found if k in expected and found[k] != expected[k]],
    }

    text = [f"{what}: {', '.join('/'.join(k) for k in paths[:50])}"
            for what, paths in problems.items() if paths]  # fmt: skip
    if text:
        raise ValueError(f"parameters do not fit {file}; {'; '.join(text)}")


def save(
    params: dict[str, Any],
    path: str | os.PathLike,
    format: str = "diffusers",
    *,
    config: Config,
    dtype: jnp.dtype = jnp.float32,
    overwrite: bool = False,
) -> None:
    """Writes a model folder in one of `FORMATS`.

    The folder appears whole: it is written under a temporary name and renamed. A model without
    ByT5 mapper or vision projection gives a folder without those tensors, which diffusers does not
    read.

    Args:
      params: the parameters.
      path: the folder; a symbolic link is followed.
      format: one of `FORMATS`.
      config: of the model.
      dtype: of the written weights.
      overwrite: an existing folder is replaced, if it was written by us and is unchanged.

    Raises:
      ValueError: unknown format; parameters that do not fit the config; `path` is a file, or a
        folder that may not be replaced.
    """
    source = TreeSource(params)
    write_model(path, config, source, format, dtype=dtype, overwrite=overwrite)


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
    rows, shapes = layouts.key_table(config, layout)
    _check_shapes(rows, shapes, source)

    # Nothing is written before all of this has passed.
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

    # Headers and shards follow from the shapes; then the values come, a layer at a time.
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
