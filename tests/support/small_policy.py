"""A policy of a few numbers in place of the DiT, for what comes before and after the velocity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import two_experts

from sage_grpo_jax.models import hunyuan_video


def install(monkeypatch: Any) -> None:
    """Puts `velocity` in place of the DiT's in every program that is traced from here on."""
    monkeypatch.setattr(hunyuan_video, "velocity", velocity)


def install_in_small_network(monkeypatch: Any) -> None:
    """The same for configs of `make_small_config`: few parameters, conditions as the DiT's."""

    def make_condition(arrays: Any, config: Any, latent_frames: int) -> hunyuan_video.Condition:
        return hunyuan_video.Condition(arrays["text"], arrays["text_mask"].astype(bool))

    monkeypatch.setattr(two_experts, "velocity", velocity)
    monkeypatch.setattr(two_experts, "make_condition", make_condition)


def velocity(params, latents, timestep, condition, config=None, adapters=None, scale=1.0):
    """Takes what `hunyuan_video.velocity` takes; in the precision of its inputs.

    Smooth, and every leaf of the parameters (of the adapters too) has a part in it of its own, as
    have latents, time, text and its mask.
    """
    del config
    coefficients = [_projections(0, params)]
    if adapters is not None:
        coefficients.append(scale * _projections(1, adapters))
    features = jnp.stack(_features(latents, timestep, condition))
    mixed = jnp.tanh(jnp.concatenate(coefficients))
    # Leaf i of them goes with feature i mod 8.
    mixed = jnp.pad(mixed, (0, -mixed.size % len(features))).reshape(-1, len(features)).sum(0)
    return 0.5 * latents + 0.2 * jnp.tensordot(mixed, features, 1)


def _projections(seed: int, tree: Any) -> jax.Array:
    """A number of every leaf that no element of it is left out of; [leaves]."""
    leaves = jax.tree.leaves(tree)
    sizes = [leaf.size for leaf in leaves]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], sum(sizes))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    scaled = flat * jnp.asarray(signs / np.sqrt(np.repeat(sizes, sizes)), flat.dtype)
    return jax.ops.segment_sum(scaled, owner, len(sizes))


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
