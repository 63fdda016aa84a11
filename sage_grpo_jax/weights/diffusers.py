"""Model folders in diffusers' layout: config.json beside diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sage_grpo_jax.models import hunyuan_video, hunyuan_video_config, vae
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights import safetensors_io, transformer_keys, vae_keys
from sage_grpo_jax.weights.key_table import Path, Row, Shape, check_parameters, check_tensors

Config = HunyuanVideoConfig | VaeConfig
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_CONFIGS = {
    hunyuan_video_config.CLASS_NAME: HunyuanVideoConfig,
    "AutoencoderKLHunyuanVideo15": VaeConfig,
}


def load_config(path: str | os.PathLike) -> Config:
    """The config of a model folder (or of the folder of a weights file), by its `_class_name`.

    Raises:
      ValueError: no readable config.json, or a model that is not ours.
    """
    path = pathlib.Path(path)
    file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"path={path}: no {file}")
    text = file.read_text()
    try:
        name = json.loads(text).get("_class_name")
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if name not in _CONFIGS:
        raise ValueError(f"{file}: _class_name={name!r}: must be one of {list(_CONFIGS)}")
    return _CONFIGS[name].from_json(text)


def load(
    path: str | os.PathLike,
    config: Config,
    shardings: Any = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, Any]:
    """Parameters from safetensors in diffusers' layout.

    Args:
      path: folder with one *.safetensors file, or shards and their index; or one file.
      config: decides model and key table.
      shardings: tree of `jax.sharding.Sharding` like the parameters: each host then reads only the
        slices that its devices hold. None: default device.
      dtype: of the parameters; values are cast while they are read.

    Raises:
      ValueError: unreadable files; tensors missing, unexpected or misshapen (all are named).
    """
    rows, shapes = _table(config)
    reader = safetensors_io.Reader(path)
    check_tensors(rows, shapes, reader.shapes)
    where = {} if shardings is None else traverse_util.flatten_dict(shardings)
    params = {}
    for row in rows:
        read = _slice_reader(reader, row, shapes[row.ours], np.dtype(dtype))
        if shardings is None:
            params[row.ours] = jnp.asarray(read((slice(None),) * len(shapes[row.ours])))
        else:
            params[row.ours] = jax.make_array_from_callback(shapes[row.ours], where[row.ours], read)
    return traverse_util.unflatten_dict(params)


def save(
    params: dict[str, Any],
    path: str | os.PathLike,
    format: str = "diffusers",
    *,
    config: Config,
    dtype: jnp.dtype = jnp.float32,
) -> None:
    """Writes a model folder that diffusers' `from_pretrained` reads; replaces an existing one.

    The folder appears whole: it is written under a temporary name and renamed. A model without
    ByT5 mapper or vision projection gives a folder without those tensors, which only `load` reads.

    Raises:
      ValueError: unknown format; parameters that do not fit the config; `path` is a file.
    """
    if format != "diffusers":
        raise ValueError(f"format={format!r}: must be 'diffusers'")
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"path={path}: must be a folder, or not exist")
    rows, expected = _table(config)
    flat = traverse_util.flatten_dict(params)
    found = {name: tuple(value.shape) for name, value in flat.items()}
    check_parameters(rows, found)
    wrong = [f"{'/'.join(k)}: {found[k]} instead of {expected[k]}" for k in found
             if found[k] != expected[k]]  # fmt: skip
    if wrong:
        raise ValueError(f"parameters of the wrong shape: {', '.join(wrong)}")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for row in rows:
            yield from row.to_theirs(np.asarray(jax.device_get(flat[row.ours])))

    shapes = {name: row.shape_there(expected[row.ours]) for row in rows for name in row.names()}

    def fill(folder: pathlib.Path) -> None:
        safetensors_io.write(folder / WEIGHTS_FILE, shapes, np.dtype(dtype), tensors())
        (folder / CONFIG_FILE).write_text(config.to_json())

    _replace_folder(path, fill)


def _table(config: Config) -> tuple[list[Row], dict[Path, Shape]]:
    """Key table of the model, and the shape of each of its parameters."""
    if isinstance(config, HunyuanVideoConfig):
        model, rows = hunyuan_video, transformer_keys.diffusers_rows(config)
    elif isinstance(config, VaeConfig):
        model, rows = vae, vae_keys.diffusers_rows(config)
    else:
        raise ValueError(f"config={config!r}: must be a HunyuanVideoConfig or a VaeConfig")
    abstract = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract).items()}
    check_parameters(rows, shapes)
    return rows, shapes


def _slice_reader(
    reader: safetensors_io.Reader, row: Row, shape: Shape, dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function from a slice of our parameter to its values, read from the files."""
    cache = {}  # devices that hold the same slice share one read

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in cache:
            cache[bounds] = read_bounds(bounds)
        return cache[bounds]

    def read_bounds(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        layers = row.names()
        if row.stacked is not None:
            layers, bounds = layers[slice(*bounds[0])], bounds[1:]
        there = row.layout.index_there(tuple(slice(*bound) for bound in bounds))
        out = np.empty((len(layers), *(stop - start for start, stop in bounds)), dtype)
        for i, name in enumerate(layers):
            out[i] = row.layout.to_ours(reader.read(name, there))
        return out if row.stacked is not None else out[0]

    return read


def _replace_folder(path: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Fills a temporary folder beside `path` and puts it in its place."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        fill(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
