"""A stack of equal layers: its parameters, and how it is run.

It is scanned or unrolled, recomputed in the backward pass or not, with or without adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from sage_grpo_jax.models import lora


def blocks(
    parent: nn.Module,
    block: type[nn.Module],
    carry: Any,
    shared: tuple[Any, ...],
    adapters: Any = None,
    scale: float = 1.0,
) -> Any:
    """The carry after all blocks of a transformer; to be called in its compact method.

    Args:
      parent: the transformer. Its `config` says how many blocks there are and how they are run;
        their parameters are stacked below its key `blocks`.
      block: class of a block, `block(config)(carry, *shared) -> (carry, None)`.
      carry: what goes into the first block.
      shared: what every block sees.
      adapters: LoRA adapters of the blocks, or None; see `run`.
      scale: of the adapters.
    """
    config = parent.config
    if parent.is_initializing():
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * len(shared),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(config, name="blocks")(carry, *shared)[0]

    def apply(params: Any, carry: Any) -> Any:
        return block(config, parent=None).apply({"params": params}, carry, *shared)[0]

    return run(
        apply,
        carry,
        parent.variables["params"]["blocks"],
        remat=config.remat,
        unroll=config.unroll,
        adapters=adapters,
        scale=scale,
    )


def run(
    apply: Callable[[Any, Any], Any],
    carry: Any,
    params: Any,
    *,
    remat: bool,
    unroll: bool,
    adapters: Any = None,
    scale: float = 1.0,
) -> Any:
    """The carry after all layers.

    Args:
      apply: (parameters of one layer, carry) -> carry of the same shapes and dtypes.
      carry: what goes into the first layer.
      params: of all layers, leaves [layers, ...].
      remat: recompute each layer in the backward pass.
      unroll: lay the layers out one after another instead of scanning over them.
      adapters: LoRA adapters (`models.lora`), leaves [layers, ...], or None. They are merged layer
        by layer, inside what the backward pass recomputes.
      scale: of the adapters.
    """

    def layer(carry: Any, given: tuple[Any, Any]) -> tuple[Any, None]:
        params, adapters = given
        if adapters is not None:
            params = lora.merge_layer(params, adapters, scale)
        return apply(params, carry), None

    stacked = (params, adapters)
    if not unroll:
        if remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(layer, carry, stacked)[0]

    if remat:
        layer = jax.checkpoint(layer)
    # Splits, not slices: their transpose is one concatenation, and what the backward pass needs is
    # not copied into stacks.
    leaves, tree = jax.tree.flatten(stacked)
    split = [jax.lax.split(leaf, [1] * len(leaf)) for leaf in leaves]
    for parts in zip(*split, strict=True):
        carry, _ = layer(carry, jax.tree.unflatten(tree, [part[0] for part in parts]))
    return carry
