"""Which key table goes with which model and layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
from flax import traverse_util

from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights import transformer_keys, vae_keys
from sage_grpo_jax.weights.key_table import Path, Row, Shape, check_parameters

Config = HunyuanVideoConfig | VaeConfig
LAYOUTS = ("diffusers", "tencent")
_ROWS = {
    (HunyuanVideoConfig, "diffusers"): transformer_keys.diffusers_rows,
    (HunyuanVideoConfig, "tencent"): transformer_keys.tencent_rows,
    (VaeConfig, "diffusers"): vae_keys.diffusers_rows,
    (VaeConfig, "tencent"): vae_keys.tencent_rows,
}
# A tensor that every file of this model and layout has, and no other.
_MARKS = {
    "x_embedder.proj.weight": (HunyuanVideoConfig, "diffusers"),
    "img_in.proj.weight": (HunyuanVideoConfig, "tencent"),
    "encoder.down_blocks.0.resnets.0.conv1.conv.weight": (VaeConfig, "diffusers"),
    "encoder.down.0.block.0.conv1.conv.weight": (VaeConfig, "tencent"),
}
_DIT_SHAPELESS = ("rope_theta", "target_size", "task_type", "dtype", "attention", "remat",
                  "unroll")  # fmt: skip
MODEL_NAMES = {HunyuanVideoConfig: "HunyuanVideo-1.5 DiT", VaeConfig: "HunyuanVideo-1.5 VAE"}


def parameter_shapes(config: Config) -> dict[Path, Shape]:
    """The shape of each parameter of a model, by path.

    Raises:
      ValueError: not the config of a model that has a key table.
    """
    return dict(_parameter_shapes(_shape_of(config)))


def _shape_of(config: Config) -> Config:
    """The config without what no shape depends on: tracing a model takes a second."""
    if isinstance(config, HunyuanVideoConfig):
        plain = HunyuanVideoConfig()
        same = {name: getattr(plain, name) for name in _DIT_SHAPELESS}
        return dataclasses.replace(config, **same)
    if isinstance(config, VaeConfig):
        return dataclasses.replace(config, scaling_factor=1.0, dtype="float32")
    raise ValueError(f"config={config!r}: must be a HunyuanVideoConfig or a VaeConfig")


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config: Config) -> dict[Path, Shape]:
    model = hunyuan_video if isinstance(config, HunyuanVideoConfig) else vae
    abstract = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract).items()}


def rows(config: Config, layout: str) -> list[Row]:
    """Key table of a model in one of `LAYOUTS`."""
    return _ROWS[type(config), layout](config)


def key_table(config: Config, layout: str) -> tuple[list[Row], dict[Path, Shape]]:
    """Key table of a model in one of `LAYOUTS`, and the shape of each parameter."""
    shapes = parameter_shapes(config)
    table = rows(config, layout)
    check_parameters(table, shapes)
    return table, shapes


def recognise(tensors: Mapping[str, Shape]) -> tuple[type, str] | None:
    """(class of the config, layout) that tensors of these names belong to, or None."""
    found = [kind for name, kind in _MARKS.items() if name in tensors]
    return found[0] if len(found) == 1 else None
