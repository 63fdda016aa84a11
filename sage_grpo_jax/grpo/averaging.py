"""Moving averages of the parameters: how much of the old average stays, and the mixing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def warmed_up(count: jax.Array, decay: float) -> jax.Array:
    """Returns min(decay, (1 + n)/(10 + n)), f32[]: the first updates are forgotten sooner.

    Args:
      count: n, applied updates so far, i32[].
      decay: in [0, 1).

    Source: Flow-GRPO, flow_grpo/ema.py.
    """
    return jnp.minimum((1.0 + count) / (10.0 + count), decay)


def ramp(count: jax.Array, start: int, rate: float, highest: float) -> jax.Array:
    """Returns min(rate·(n - start), highest), 0 before `start` updates: at first the newest policy.

    Source: DiffusionNFT, scripts/train_nft_sd3.py, return_decay.
    """
    return jnp.minimum(rate * jnp.maximum(count - start, 0), highest)


def mix(average: Any, params: Any, decay: jax.Array) -> Any:
    """Returns decay·average + (1 - decay)·params, leaf by leaf; a decay of 1 changes no bit.

    Args:
      average, params: trees of the same structure.
      decay: f32[] in [0, 1].
    """

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        # In this form equal values stay equal, and a decay of 0 gives the parameters themselves.
        return jnp.where(decay == 1.0, old, new + decay.astype(new.dtype) * (old - new))

    return jax.tree.map(leaf, average, params)
