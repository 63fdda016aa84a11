"""The models that there are: one line each. Everything else asks here and names none.

A model is a module that has what `models.door` asks for, and a module of weight tables
(`weights.tables.model_tables`). They are named as texts and imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from sage_grpo_jax.models.door import VideoAutoencoder, VideoModel

TRANSFORMER, AUTOENCODER = "transformer", "autoencoder"


class Entry(NamedTuple):
    """Where a model's code is.

    Attributes:
      kind: `TRANSFORMER` or `AUTOENCODER`.
      model: module that has what `door.VideoModel` or `door.VideoAutoencoder` asks for.
      tables: module of its weight tables.
    """

    kind: str
    model: str
    tables: str


_MODELS, _TABLES = "sage_grpo_jax.models", "sage_grpo_jax.weights.tables"
# By `_class_name` in diffusers' config.json.
ENTRIES: dict[str, Entry] = {
    "HunyuanVideo15Transformer3DModel": Entry(
        TRANSFORMER, f"{_MODELS}.hunyuan_video", f"{_TABLES}.hunyuan_video_keys"
    ),
    "AutoencoderKLHunyuanVideo15": Entry(
        AUTOENCODER, f"{_MODELS}.vae", f"{_TABLES}.hunyuan_vae_keys"
    ),
    "WanTransformer3DModel": Entry(TRANSFORMER, f"{_MODELS}.wan", f"{_TABLES}.wan_keys"),
    "AutoencoderKLWan": Entry(AUTOENCODER, f"{_MODELS}.wan_vae", f"{_TABLES}.wan_vae_keys"),
}


def named(class_name: str) -> VideoModel | VideoAutoencoder:
    """The model of a config.json.

    Raises:
      ValueError: no model of that name.
    """
    if class_name not in ENTRIES:
        raise ValueError(f"_class_name={class_name!r}: must be one of {[*ENTRIES]}")
    return importlib.import_module(ENTRIES[class_name].model)


def name_of(config: Any) -> str:
    """The name in `ENTRIES` of the model that a config belongs to.

    Raises:
      ValueError: a config of no registered model.
    """
    for name in ENTRIES:
        if type(config) is named(name).Config:
            return name
    raise ValueError(f"config={config!r}: must be the config of one of {[*ENTRIES]}")


def of(config: Any) -> VideoModel | VideoAutoencoder:
    """The model that a config belongs to; raises as `name_of`."""
    return named(name_of(config))


def kind_of(config: Any) -> str:
    """`TRANSFORMER` or `AUTOENCODER`; raises as `name_of`."""
    return ENTRIES[name_of(config)].kind


def names(kind: str) -> list[str]:
    """The names in `ENTRIES` of all models of a kind."""
    return [name for name, entry in ENTRIES.items() if entry.kind == kind]


def tables_of(class_name: str) -> Any:
    """The module of weight tables of a model; see `weights.tables.model_tables`."""
    return importlib.import_module(ENTRIES[class_name].tables)


def variants() -> list[str]:
    """Names of all released variants."""
    return [variant for name in names(TRANSFORMER) for variant in named(name).RELEASED]


def released(kind: str, variant: str) -> Any:
    """The config of a released variant's transformer, or of its autoencoder.

    Raises:
      ValueError: no such variant.
    """
    for name in names(kind):
        if variant in named(name).RELEASED:
            return named(name).RELEASED[variant]
    raise ValueError(f"variant={variant!r}: must be one of {variants()}")
