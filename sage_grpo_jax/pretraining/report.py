"""Judges pretrained models: reconstructions, samples of validation captions, contact sheets."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.data import media
from sage_grpo_jax.flow import noise, schedules
from sage_grpo_jax.models import frames, registry
from sage_grpo_jax.models.door import AutoencoderConfig, TransformerConfig
from sage_grpo_jax.policy import sampler
from sage_grpo_jax.policy.policy import Policy
from sage_grpo_jax.pretraining.loop import Params, say
from sage_grpo_jax.pretraining.settings import ReportConfig
from sage_grpo_jax.rewards.backends.moving_shapes import MovingShapesBackend
from sage_grpo_jax.worlds.moving_shapes import recognition as shape_recognition
from sage_grpo_jax.worlds.moving_shapes import word_embeddings
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes

# Clips at a time: bounds memory.
_BATCH = 16


class Pipeline(NamedTuple):
    """An autoencoder and a transformer with their parameters; the units of latents join them."""

    vae: AutoencoderConfig
    vae_params: Params
    transformer: TransformerConfig
    transformer_params: Params


def judge(
    pipeline: Pipeline, config: ReportConfig, key: jax.Array, workdir: pathlib.Path
) -> dict[str, float]:
    """Measures real clips, reconstructions and validation samples; writes contact sheets.

    Returns:
      Reconstruction error, manifold distances, mean normalised rewards and how often the captioned
      shape is seen, by name.
    """
    # Real clips, and what the autoencoder makes of them; pixels are 0 to 1, so the peak is 1.
    captions = spread(moving_shapes.split_captions("validation"), config.num_samples)
    real = moving_shapes.render(moving_shapes.parameters_from_captions(captions, key))
    decoded = reconstruct(pipeline, real)
    numbers = {
        "reconstruction_l1": float(jnp.mean(jnp.abs(jnp.clip(decoded, 0, 1) - real))),
        "reconstruction_psnr": float(
            -10 * jnp.log10(jnp.mean(jnp.square(jnp.clip(decoded, 0, 1) - real)))
        ),
    }

    # Samples of the same captions, always from the same noise: exports can be compared.
    videos = {
        "real": moving_shapes.to_uint8(real),
        "reconstructions": moving_shapes.to_uint8(decoded),
    }
    for steps in config.sampling_steps:
        samples = sample(pipeline, captions, steps, config.shift, noise_seed=0)
        videos[f"samples_{steps}_steps"] = moving_shapes.to_uint8(samples)

    # Every set is measured alike.
    for name, clips in videos.items():
        distance = np.asarray(moving_shapes.manifold_distance(clips))
        numbers[f"manifold_distance/{name}"] = float(distance.mean())
        say(f"export: manifold distance of {name}: {distance.mean():.5f}")
        numbers |= mean_rewards(clips, captions, name)
        identity = shape_recognition.identity(clips, captions)
        numbers |= {f"shape_{key}/{name}": value for key, value in identity._asdict().items()}

        # The sheet shows clips at even distances: nobody has chosen them.
        rows = np.unique(np.linspace(0, len(clips) - 1, config.sheet_rows).round().astype(int))
        shown = [captions[row] for row in rows]
        sheet = media.contact_sheet(clips[rows], shown, config.sheet_frames)
        media.write_picture(workdir / f"{name}.png", sheet)
    return numbers


def mean_rewards(clips: np.ndarray, captions: Sequence[str], name: str) -> dict[str, float]:
    """Mean normalised rewards of uint8[N, F, H, W, 3], as "REWARD/name" in lower case."""
    backend, fps = MovingShapesBackend(), float(moving_shapes.spec.FPS)
    scores = [backend.score(clip, text, fps) for clip, text in zip(clips, captions, strict=True)]
    return {
        f"{reward.lower()}/{name}": float(np.mean([score[reward].normalised for score in scores]))
        for reward in backend.names
    }


def spread(items: Sequence[str], n: int) -> list[str]:
    """n items at even distances, repeated from the start when there are fewer."""
    return [items[(i * max(len(items), n) // n) % len(items)] for i in range(n)]


def reconstruct(pipeline: Pipeline, videos: jax.Array) -> jax.Array:
    """Encodes and decodes clips: f32[N, F, H, W, 3] in [0, 1], the output not clipped."""
    chex.assert_rank(videos, 5)
    vae = registry.of(pipeline.vae)

    @jax.jit
    def round_trip(batch: jax.Array) -> jax.Array:
        mean, _ = vae.encode(pipeline.vae_params, 2.0 * batch - 1.0, pipeline.vae)
        return 0.5 * vae.decode(pipeline.vae_params, mean, pipeline.vae) + 0.5

    return jnp.concatenate([round_trip(videos[i : i + _BATCH]) for i in _starts(len(videos))])


def sample(
    pipeline: Pipeline, captions: Sequence[str], steps: int, shift: float, noise_seed: int
) -> jax.Array:
    """Clips for captions by the ODE sampler, without guidance.

    Returns:
      f32[N, F, H, W, 3], 0 to 1 but not clipped.
    """
    # The sampler of training and `sample`, without noise.
    transformer = pipeline.transformer
    model, shape = registry.of(transformer), latent_shape(pipeline.vae)
    sampling = sampler.Sampling(schedules.make_schedule(steps, shift), shape)
    rollout = sampler.make_rollout(transformer, sampling)
    text, mask = word_embeddings.encode_padded(captions, model.embedding_needs(transformer).text)

    @jax.jit
    def generate(keys: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
        prompts = {"text": text, "text_mask": mask}
        condition = model.make_condition(prompts, transformer, shape[0])
        path = rollout(Policy(pipeline.transformer_params), condition, None, keys)
        videos = frames.decode_videos(pipeline.vae_params, path.latents[-1], pipeline.vae)
        return 0.5 * videos + 0.5

    # Keys as in training: noise depends on a sample's caption and number, not on the batch.
    videos = []
    for start in _starts(len(captions)):
        batch = slice(start, start + _BATCH)
        hashes = jnp.array([noise.prompt_hash(text) for text in captions[batch]], jnp.uint32)
        numbers = jnp.arange(start, start + len(hashes))
        keys = noise.sample_keys(noise_seed, 0, 0, hashes, numbers)
        videos.append(generate(keys, text[batch], mask[batch]))
    return jnp.concatenate(videos)


def latent_shape(model: AutoencoderConfig) -> tuple[int, int, int, int]:
    """[T, H, W, C] of the latents of one clip of the world."""
    spec = moving_shapes.spec
    return frames.latent_shape(model, spec.NUM_FRAMES, spec.HEIGHT, spec.WIDTH)


def _starts(n: int) -> range:
    return range(0, n, _BATCH)
