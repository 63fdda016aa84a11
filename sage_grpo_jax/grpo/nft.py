"""DiffusionNFT: the policy loss on the forward process, without a stochastic sampler.

A clean sample x0 of the policy that samples, v_old, is noised again, x = (1 - σ)·x0 + σ·ε, and the
velocity is regressed on the target ε - x0 twice: by an implicit positive policy v₊ = v_old +
β·(v - v_old), weighted by how good the sample is, r in [0, 1], and by an implicit negative policy
v₋ = v_old - β·(v - v_old), weighted by 1 - r. Good samples attract the policy, bad ones repel it;
r = ½ does neither: then v = v_old is optimal.

Source: arXiv 2509.16117; github.com/NVlabs/DiffusionNFT, scripts/train_nft_sd3.py.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

# The adaptive weight is at most one over this, as its authors have it.
_SMALLEST_DISTANCE = 1e-5


def optimality(advantages: jax.Array, clip: float) -> jax.Array:
    """Returns r = ½ + clip(A, ±clip)/(2·clip), f32 in [0, 1]: how good a sample is in its group."""
    if not clip > 0:
        raise ValueError(f"clip={clip!r}: must be > 0")
    return 0.5 + jnp.clip(advantages, -clip, clip) / (2.0 * clip)


def noised(clean: jax.Array, noise: jax.Array, sigma: Any) -> tuple[jax.Array, jax.Array]:
    """Returns ((1 - σ)·x0 + σ·ε, ε - x0): a state of the forward process, and its velocity.

    Args:
      clean, noise: x0 and ε, f32[B, ...].
      sigma: scalar or [B].
    """
    chex.assert_equal_shape([clean, noise])
    sigma = _per_sample(sigma, clean)
    return (1.0 - sigma) * clean + sigma * noise, noise - clean


def nft_loss(
    velocity: jax.Array,
    velocity_old: jax.Array,
    target: jax.Array,
    sigma: Any,
    good: jax.Array,
    beta: float,
    *,
    adaptive: bool = True,
) -> jax.Array:
    """Returns (r·L₊ + (1 - r)·L₋)/β of every sample, f32[B], L± = |v± - target|² by elements.

    Args:
      velocity: v of the policy that is trained, [B, ...].
      velocity_old: of the policy that sampled; no gradient flows into it.
      target: ε - x0, of `noised`.
      sigma: of the state, scalar or [B].
      good: r, [B], of `optimality`.
      beta: how far the implicit policies lie from v_old, > 0; v itself is optimal at
        v_old + (2r - 1)/β·(target - v_old), so a smaller β goes further.
      adaptive: each L± is that of the predicted clean sample, (σ·(v± - target))², divided by the
        mean of its root, σ·|v± - target|, which gets no gradient: every σ and every sample
        weighs about the same. False: L± as above, averaged over the elements.
    """
    chex.assert_equal_shape([velocity, velocity_old, target])
    if not beta > 0:
        raise ValueError(f"beta={beta!r}: must be > 0")
    velocity_old = jax.lax.stop_gradient(velocity_old)

    # v± = v_old ± β·(v - v_old)
    change = beta * (velocity - velocity_old)

    def distance(implicit: jax.Array) -> jax.Array:
        error = implicit - target
        axes = tuple(range(1, error.ndim))
        if not adaptive:
            return (error**2).mean(axes)
        # x̂0 = x - σ·v, so that its error is σ times that of the velocity.
        error = _per_sample(sigma, error) * error
        mean = jax.lax.stop_gradient(jnp.abs(error).mean(axes))
        return (error**2).mean(axes) / jnp.maximum(mean, _SMALLEST_DISTANCE)

    # Good samples attract, bad ones repel.
    attract, repel = distance(velocity_old + change), distance(velocity_old - change)
    return (good * attract + (1.0 - good) * repel) / beta


def velocity_distance(velocity: jax.Array, velocity_ref: jax.Array) -> jax.Array:
    """Returns the mean of (v - v_ref)² over the elements, f32[B]: the penalty in place of a KL."""
    chex.assert_equal_shape([velocity, velocity_ref])
    return ((velocity - velocity_ref) ** 2).mean(tuple(range(1, velocity.ndim)))


def _per_sample(value: Any, like: jax.Array) -> jax.Array:
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value
