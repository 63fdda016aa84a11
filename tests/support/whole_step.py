"""A learner's step beside the one of textbook.py: the small policy, no VAE, the same problem."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import small_policy
import textbook

from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.training import programs as programs_lib


def as_pixels(latents: np.ndarray) -> np.ndarray:
    """A stand-in for decoding that keeps samples apart; uint8 [B, t, h, w, C]."""
    return np.clip(np.round(128 + 24 * latents), 0, 255).astype(np.uint8)


def build_programs(blueprint):
    """The real programs but for the VAE, which has no part in this."""

    def decode(vae_params, latents, piece, size):
        chunk = np.asarray(latents)[piece :: latents.shape[0] // size]
        return jnp.asarray(as_pixels(chunk.reshape(-1, *blueprint.plan.latent_shape)))

    programs = programs_lib.build(blueprint)
    return dataclasses.replace(programs, decode=decode)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def make_problem(trainer) -> textbook.Problem:
    """The textbook's problem of a trainer."""
    learner = trainer.learner
    config, base = learner.config, wide(learner.frozen.base)

    def velocity(trained, latents, timestep, condition):
        if base is None:
            return small_policy.velocity(trained, latents, timestep, condition)
        scale = config.lora.alpha / config.lora.rank
        return small_policy.velocity(
            base, latents, timestep, condition, adapters=trained, scale=scale
        )

    return textbook.Problem(config, learner.plan.latent_shape, velocity)


def make_conditions(trainer, batch):
    """Those of the samples and of the negative prompt, float64."""
    samples = batch.repeat(trainer.learner.config.rollout.group_size)
    negative = jax.tree.map(np.asarray, trainer.learner.frozen.negative)
    count = len(samples.ids)
    pairs = (
        (samples.text, samples.mask),
        (
            np.repeat(negative.text, count, 0),
            np.repeat(negative.text_mask, count, 0),
        ),
    )
    return tuple(hunyuan_video.Condition(np.asarray(t, np.float64), m) for t, m in pairs)
