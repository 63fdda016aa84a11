"""A transformer of two experts, one for high and one for low noise, that is in no other file.

Small enough to be repeated in numpy: each expert mixes the channels of a latent in a few layers and
adds what a dense layer makes of the mean text token. Its module of weight tables is this one too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models import lora, registry
from sage_grpo_jax.models.door import EmbeddingNeeds
from sage_grpo_jax.weights.tables.key_table import Row, linear
from sage_grpo_jax.weights.tables.model_tables import ModelLayout

CLASS_NAME = "TwoExperts3DModel"
NAME = "model of two experts"
EXPERTS = ("high", "low")
_RUNTIME = ("dtype", "attention", "remat", "unroll")


@dataclasses.dataclass(frozen=True)
class Config:
    """`boundary`: the lowest timestep of the expert for high noise."""

    out_channels: int = 4
    text_dim: int = 8
    num_layers: int = 2
    boundary: float = 800.0
    dtype: str = "float32"
    attention: str = "auto"
    remat: bool = False
    unroll: bool = False

    patch = (1, 1, 1)
    attention_head_dim = 8

    @property
    def hidden_size(self) -> int:
        return self.out_channels

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Config:
        given = {name: value for name, value in values.items() if not name.startswith("_")}
        return cls(**checked_json.fields(cls, given, _RUNTIME))

    def to_json(self) -> str:
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in _RUNTIME}
        return json.dumps({"_class_name": CLASS_NAME, **values})


RELEASED: dict[str, Config] = {}
VARIANT_FIELDS: tuple[str, ...] = ()
ADAPTER_LAYERS = tuple(f"{e}/{layer}" for e in EXPERTS for layer in ("blocks/mix", "text"))
ADAPTER_TARGETS = dict.fromkeys(lora.TARGETS, ())
ADAPTER_TARGETS["proj"] = tuple(f"{e}/blocks/mix" for e in EXPERTS)


def init_params(config: Config, key: jax.Array) -> dict[str, Any]:
    channels, layers = config.out_channels, config.num_layers

    def expert(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 2)
        mix = jax.random.normal(keys[0], (layers, channels, channels))
        text = jax.random.normal(keys[1], (config.text_dim, channels))
        return {
            "blocks": {"mix": {"kernel": mix, "bias": jnp.zeros((layers, channels))}},
            "text": {"kernel": text, "bias": jnp.zeros(channels)},
        }

    return dict(zip(EXPERTS, map(expert, jax.random.split(key, 2)), strict=True))


def partition_names(config: Config) -> dict[str, Any]:
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return jax.tree.map(lambda s: (None,) * (s.ndim - 1) + ("embed",), shapes)


def velocity(
    params: Any,
    latents: jax.Array,
    timestep: jax.Array,
    condition: Any,
    config: Config,
    adapters: Any = None,
    scale: float = 1.0,
) -> jax.Array:
    if adapters is not None:
        params = lora.merge(params, adapters, scale)
    count = jnp.maximum(condition["mask"].sum(1, keepdims=True), 1)
    text = jnp.where(condition["mask"][..., None], condition["text"], 0).sum(1) / count

    def expert(own: Any) -> jax.Array:
        x, mix = latents, own["blocks"]["mix"]
        for layer in range(config.num_layers):
            x = jnp.tanh(x @ mix["kernel"][layer] + mix["bias"][layer])
        return x + (text @ own["text"]["kernel"] + own["text"]["bias"])[:, None, None, None]

    high = (timestep >= config.boundary)[:, None, None, None, None]
    return jnp.where(high, expert(params["high"]), expert(params["low"]))


def make_condition(arrays: Mapping[str, Any], config: Config, latent_frames: int) -> Any:
    text = arrays["text"].astype(jnp.dtype(config.dtype))
    return {"text": text, "mask": arrays["text_mask"].astype(bool)}


def unconditional(condition: Any, negative: Any) -> Any:
    return jax.tree.map(lambda x, n: jnp.broadcast_to(n, x.shape), condition, negative)


def with_step_end(condition: Any, timestep_end: Any, config: Config) -> Any:
    return condition


def embedding_needs(config: Config) -> EmbeddingNeeds:
    return EmbeddingNeeds(config.text_dim)


def _rows(config: Config) -> list[Row]:
    rows = []
    for name in EXPERTS:
        rows += linear((name, "blocks", "mix"), f"{name}.blocks.{{i}}.mix", config.num_layers)
        rows += linear((name, "text"), f"{name}.text")
    return rows


LAYOUTS = {"diffusers": ModelLayout(_rows, mark="high.text.weight")}
SHAPELESS = ("boundary", *_RUNTIME)


def unseen(facts: Any) -> dict[str, Any]:
    raise ValueError("no config.json: boundary is not in the tensors")


def register(monkeypatch: Any) -> None:
    """Adds the one line that a model takes."""
    entry = registry.Entry(registry.TRANSFORMER, __name__, __name__)
    monkeypatch.setitem(registry.ENTRIES, CLASS_NAME, entry)
