"""Model folders: loading and saving parameters, whatever the format."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax.numpy as jnp

from sage_grpo_jax.weights import (
    configs,
    facts,
    orbax_io,
    orbax_reading,
    tables,
    tensor_files,
    writing,
)
from sage_grpo_jax.weights.configs import load_config
from sage_grpo_jax.weights.sources import FiniteSource, Source, TensorSource, TreeSource, to_devices
from sage_grpo_jax.weights.tables import Config

__all__ = ["load", "load_config", "open_source", "save"]


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


def save(
    params: dict[str, Any],
    path: str | os.PathLike,
    format: str = "diffusers",
    *,
    config: Config,
    dtype: jnp.dtype = jnp.float32,
    overwrite: bool = False,
) -> None:
    """Writes a model folder in one of `writing.FORMATS`.

    The folder appears whole: it is written under a temporary name and renamed. A model without
    ByT5 mapper or vision projection gives a folder without those tensors, which diffusers does not
    read.

    Args:
      params: the parameters.
      path: the folder; a symbolic link is followed.
      format: one of `writing.FORMATS`.
      config: of the model.
      dtype: of the written weights.
      overwrite: an existing folder is replaced, if it was written by us and is unchanged.

    Raises:
      ValueError: unknown format; parameters that do not fit the config; `path` is a file, or a
        folder that may not be replaced.
    """
    source = TreeSource(params)
    writing.write_model(path, config, source, format, dtype=dtype, overwrite=overwrite)


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
      format: one of `writing.FORMATS`; None recognises it.
      src_key: which of several nested dictionaries to read ("module", "ema").
      config_name: what messages call the config.

    Raises:
      ValueError: as of `load`.
    """
    path = pathlib.Path(path)
    if format == "orbax" or (format is None and orbax_io.is_orbax(path)):
        return _open_orbax(path, config)
    tensors = tensor_files.open_tensors(path, src_key)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if format is None:
        kind = tables.recognise(shapes)
        format = "diffusers" if kind is None else kind[1]
    try:
        facts.check_config(config, format, shapes, config_name)
        return TensorSource(*tables.key_table(config, format), tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _open_orbax(path: pathlib.Path, config: Config) -> Source:
    if not orbax_io.is_orbax(path):
        raise ValueError(f"path={path}: no folder with config.json and {orbax_io.PARAMS}/")
    source, expected = (
        orbax_reading.OrbaxSource(path / orbax_io.PARAMS),
        tables.parameter_shapes(config),
    )
    check_tree(source, expected, path / configs.CONFIG_FILE)
    return source


def check_tree(source: Source, expected: dict, file: pathlib.Path) -> None:
    """Raises a ValueError where parameters differ from what the config in `file` asks for."""
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
