"""A policy of a few numbers in place of the DiT, for what comes before and after the velocity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.training import update as update_lib


def install(monkeypatch: Any) -> None:
    """Puts `velocity` in place of the DiT's in every program that is traced from here on."""
    monkeypatch.setattr(update_lib.hunyuan_video, "velocity", velocity)


def velocity(params, latents, timestep, condition, config=None, adapters=None, scale=1.0):
    """Takes what `hunyuan_video.velocity` takes; in the precision of its inputs.

    Smooth, and every leaf of the parameters (of the adapters too) has a part in it of its own, as
    have latents, time, text and its mask.
    """
    del config
    coefficients = [_projected(i, leaf) for i, leaf in enumerate(jax.tree.leaves(params))]
    coefficients += [
        scale * _projected(1000 + i, leaf) for i, leaf in enumerate(jax.tree.leaves(adapters))
    ]
    features = _features(latents, timestep, condition)
    total = 0.5 * latents
    for i, coefficient in enumerate(coefficients):
        total += 0.2 * jnp.tanh(coefficient) * features[i % len(features)]
    return total


def _projected(number: int, leaf: jax.Array) -> jax.Array:
    """One number of all elements of a leaf, none of which it forgets."""
    signs = np.random.default_rng(number).choice([-1.0, 1.0], leaf.shape)
    return jnp.sum(leaf * jnp.asarray(signs, leaf.dtype)) / np.sqrt(leaf.size)


def _features(latents, timestep, condition) -> list[jax.Array]:
    mask = condition.text_mask[..., None]
    count = jnp.maximum(mask.sum(1), 1)
    text = (jnp.where(mask, condition.text, 0).sum(1) / count)[:, :, None, None, None, None]
    time = (timestep / 1000)[:, None, None, None, None]
    return [
        jnp.tanh(latents),
        jnp.roll(latents, 1, axis=-1),
        jnp.roll(jnp.tanh(latents), 1, axis=1),
        text[:, 0] * jnp.cos(latents),
        text[:, 1] + 0 * latents,
        text[:, 2] * jnp.roll(latents, 1, axis=2),
        time * jnp.sin(latents),
        jnp.cos(3 * time + latents),
    ]
