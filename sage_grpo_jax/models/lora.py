"""Low-rank adapters (LoRA) of the DiT: W + (alpha / r) A B, over stacked layers.

Adapters are a nested dict that mirrors the parameters of the blocks; where those have `kernel`
[layers, in, out], adapters have `down` A [layers, in, r] and `up` B [layers, r, out]. The base
weights stay frozen. The product is taken layer by layer inside the model (`merge_layer`), so that
neither the merged weights nor their gradients ever exist for all layers at once.

Source: Hu et al., arXiv 2106.09685; names of peft and diffusers: `lora_A` = A^T, `lora_B` = B^T.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

TARGETS = ("query", "key", "value", "proj", "mlp/in", "mlp/out")
STREAMS = ("image", "text")
# Adapter axis names: the rank is never sharded.
_NAMES = {"down": ("layers", "embed", None), "up": ("layers", None, "embed")}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights are adapted, and how.

    Attributes:
      rank: r, at least 1.
      alpha: the adapters are scaled by alpha / rank.
      targets: dense layers of both streams' attention and MLP, some of `TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"lora.rank: got {self.rank}; allowed: at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha: got {self.alpha}; allowed: greater than 0 and finite")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets: got {self.targets}; allowed: some of {', '.join(TARGETS)}, each "
                "once"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapted_paths(lora: LoraConfig) -> list[tuple[str, ...]]:
    """Paths of the adapted layers in the parameter tree: ("blocks", "image", "mlp", "in")."""
    return [("blocks", stream, *target.split("/")) for stream in STREAMS for target in lora.targets]


def abstract_adapters(params: Any, lora: LoraConfig) -> dict[str, Any]:
    """ShapeDtypeStructs of the float32 adapters.

    Args:
      params: the model's parameters, or their shapes.
      lora: rank and targets.
    """
    flat = traverse_util.flatten_dict(params)
    shapes = {}
    for path in adapted_paths(lora):
        layers, fan_in, fan_out = flat[(*path, "kernel")].shape
        shapes[(*path, "down")] = (layers, fan_in, lora.rank)
        shapes[(*path, "up")] = (layers, lora.rank, fan_out)
    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    )


def init_adapters(params: Any, lora: LoraConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 adapters: A normal with standard deviation 1/sqrt(in), B zero.

    With B = 0 the model is the base model bit for bit.

    Args:
      params: the model's parameters, or their shapes.
      lora: rank and targets.
      key: of the random numbers; each leaf has its own, by its place in the sorted tree.
    """
    flat = traverse_util.flatten_dict(abstract_adapters(params, lora))
    adapters = {}
    for i, (path, leaf) in enumerate(sorted(flat.items())):
        if path[-1] == "up":
            adapters[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            adapters[path] = noise / np.sqrt(leaf.shape[-2])
    return traverse_util.unflatten_dict(adapters)


def partition_names(lora: LoraConfig) -> dict[str, Any]:
    """Logical axis names of the adapters: a tree like them."""
    return traverse_util.unflatten_dict(
        {(*path, part): names for path in adapted_paths(lora) for part, names in _NAMES.items()}
    )


def merge_layer(block: Any, adapters: Any, scale: float) -> Any:
    """The parameters of a block (or of stacked blocks) with the adapters added to its kernels.

    Args:
      block: parameters; kernels [..., in, out].
      adapters: their adapters: down [..., in, r], up [..., r, out].
      scale: alpha / rank.

    Returns:
      Like `block`; adapted kernels are float32 where base or adapters are.
    """
    flat = traverse_util.flatten_dict(block)
    given = traverse_util.flatten_dict(adapters)
    for path in [path[:-1] for path in given if path[-1] == "down"]:
        product = jnp.matmul(
            given[(*path, "down")], given[(*path, "up")], precision=jax.lax.Precision.HIGHEST
        )
        flat[(*path, "kernel")] = flat[(*path, "kernel")] + scale * product
    return traverse_util.unflatten_dict(flat)


def merge(params: Any, adapters: Any, scale: float) -> Any:
    """All parameters with the adapters added: W + scale * A B; for export and small models."""
    return {**params, "blocks": merge_layer(params["blocks"], adapters["blocks"], scale)}
