"""How a stack of equal layers is run: scanned or unrolled, recomputed or not, with adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from sage_grpo_jax.models import lora


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

    def layer(carry, given):
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
