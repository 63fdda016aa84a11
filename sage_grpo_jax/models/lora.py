"""Low-rank adapters (LoRA) of a transformer: W + (alpha / r) A B, over stacked layers.

Which layers a target stands for is the model's to say (`models.door`).
Adapters are a nested dict that mirrors the parameters; where those have `kernel` [..., in, out],
adapters have `down` A [..., in, r] and `up` B [..., r, out]; in blocks the layers are in front. The
base weights stay frozen. In the stacked blocks the product is taken layer by layer inside the
model (`merge_layer`), so that neither the merged weights nor their gradients ever exist for
all layers at once.

Source: Hu et al., arXiv 2106.09685; names of peft and diffusers: `lora_A` = A^T, `lora_B` = B^T.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sage_grpo_jax.models.door import VideoModel

# The targets that every model knows, see `door.VideoModel.ADAPTER_TARGETS`.
TARGETS = ("query", "key", "value", "proj", "mlp/in", "mlp/out")
# Adapter axis names: the rank is never sharded.
_NAMES = {"down": ("embed", None), "up": (None, "embed")}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights are adapted, and how.

    Attributes:
      rank: r, at least 1.
      alpha: the adapters are scaled by alpha / rank.
      targets: dense layers: of `TARGETS` (each stands for several) or, one by one, of the model's
        ADAPTER_LAYERS.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"lora.rank: got {self.rank}; allowed: at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha: got {self.alpha}; allowed: greater than 0 and finite")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets: got {self.targets}; allowed: at least one, each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapted_paths(lora: LoraConfig, model: VideoModel) -> list[tuple[str, ...]]:
    """Paths of the adapted layers in the parameters of a model: ("blocks", "image", "mlp", "in").

    Raises:
      ValueError: targets that the model does not know, a layer twice, or none at all.
    """
    unknown = {*lora.targets}.difference(model.ADAPTER_TARGETS, model.ADAPTER_LAYERS)
    paths = [path for target in lora.targets for path in _expand(target, model)]
    if unknown or not paths or len(set(paths)) < len(paths):
        raise ValueError(
            f"lora.targets: got {lora.targets}; allowed: some of "
            f"{', '.join(model.ADAPTER_TARGETS)}, or single layers as {model.ADAPTER_LAYERS[0]} "
            f"and {model.ADAPTER_LAYERS[-1]}, each once"
        )
    return [tuple(path.split("/")) for path in model.ADAPTER_LAYERS if path in paths]


def targets_of(paths: Iterable[tuple[str, ...]], model: VideoModel) -> tuple[str, ...]:
    """The targets that stand for these layers, as short as they get."""
    left = {"/".join(path) for path in paths}
    # A model may have nothing that a target stands for.
    some = [target for target in TARGETS if _expand(target, model)]
    whole = [target for target in some if left.issuperset(_expand(target, model))]
    left -= {path for target in whole for path in _expand(target, model)}
    return (*whole, *(path for path in model.ADAPTER_LAYERS if path in left))


def _expand(target: str, model: VideoModel) -> tuple[str, ...]:
    return model.ADAPTER_TARGETS.get(target, (target,))


def abstract_adapters(params: Any, lora: LoraConfig, model: VideoModel) -> dict[str, Any]:
    """ShapeDtypeStructs of the float32 adapters.

    Args:
      params: the model's parameters, or their shapes.
      lora: rank and targets.
      model: that they belong to, of `models.registry`.

    Raises:
      ValueError: targets that the model does not know, or in parts that it has not.
    """
    flat = traverse_util.flatten_dict(params)
    shapes = {}
    for path in adapted_paths(lora, model):
        if (*path, "kernel") not in flat:
            raise ValueError(
                f"lora.targets: got {'/'.join(path)}; allowed: layers that the model has"
            )
        *layers, fan_in, fan_out = flat[(*path, "kernel")].shape
        shapes[(*path, "down")] = (*layers, fan_in, lora.rank)
        shapes[(*path, "up")] = (*layers, lora.rank, fan_out)
    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    )


def init_adapters(
    params: Any, lora: LoraConfig, key: jax.Array, model: VideoModel
) -> dict[str, Any]:
    """Fresh float32 adapters: A normal with standard deviation 1/sqrt(in), B zero.

    With B = 0 the model is the base model bit for bit.

    Args:
      params: the model's parameters, or their shapes.
      lora: rank and targets.
      key: of the random numbers; each leaf has its own, by its place in the sorted tree.
      model: that they belong to, of `models.registry`.
    """
    flat = traverse_util.flatten_dict(abstract_adapters(params, lora, model))
    adapters = {}
    for i, (path, leaf) in enumerate(sorted(flat.items())):
        if path[-1] == "up":
            adapters[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            adapters[path] = noise / np.sqrt(leaf.shape[-2])
    return traverse_util.unflatten_dict(adapters)


def start_from(fresh: Any, given: Any, ratio: float) -> Any:
    """Adapters to go on training from: those given, and fresh ones where nothing is given.

    The product is that of the given ones: B is zero wherever A is fresh.

    Args:
      fresh: of `init_adapters`: the tree to be trained.
      given: a tree of some of its layers, of the same or a lower rank; a layer that is all zero
        counts as not given.
      ratio: the scale of the given adapters, divided by that of the trained ones.
    """
    flat, found = traverse_util.flatten_dict(fresh), traverse_util.flatten_dict(given)
    for path in [path[:-1] for path in found if path[-1] == "down"]:
        down, up = found[(*path, "down")], found[(*path, "up")]
        rank, new = down.shape[-1], flat[(*path, "down")]
        is_given = jnp.any(down != 0, axis=(-2, -1), keepdims=True)
        filled = jnp.concatenate([down, new[..., rank:]], axis=-1)
        flat[(*path, "down")] = jnp.where(is_given, filled, new)
        flat[(*path, "up")] = flat[(*path, "up")].at[..., :rank, :].set(ratio * up)
    return traverse_util.unflatten_dict(flat)


def partition_names(lora: LoraConfig, model: VideoModel) -> dict[str, Any]:
    """Logical axis names of the adapters: a tree like them."""
    return traverse_util.unflatten_dict(
        {
            (*path, part): ("layers", *names) if "blocks" in path else names
            for path in adapted_paths(lora, model)
            for part, names in _NAMES.items()
        }
    )


def merge_layer(block: Any, adapters: Any, scale: float) -> Any:
    """The parameters of a block, or of any part of the model, with the adapters in its kernels.

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


def split_blocks(params: Any, adapters: Any, scale: float) -> tuple[Any, Any]:
    """Merges what lies outside the stacked blocks; their adapters are left to them.

    Returns:
      (parameters, adapters of the blocks or None)
    """
    outside = {name: part for name, part in adapters.items() if name != "blocks"}
    merged = merge_layer({name: params[name] for name in outside}, outside, scale)
    return {**params, **merged}, adapters.get("blocks")


def merge(params: Any, adapters: Any, scale: float) -> Any:
    """All parameters with the adapters added: W + scale * A B; for export and small models."""
    return merge_layer(params, adapters, scale)
