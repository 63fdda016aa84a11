"""The compiled sampler: embeddings and noise keys in, latents out; latents in, frames out.

Two programs, each compiled once a shape: the denoising chain (a scan over the steps, guidance
inside) and the decoder, which works on a few clips at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sage_grpo_jax.flow import guidance, noise, rollout, schedules
from sage_grpo_jax.models import frames, hunyuan_video, vae
from sage_grpo_jax.parallel import hosts, sharding
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.sampling.settings import Settings


class Policy(NamedTuple):
    """What gives the velocity: weights, and adapters where there are any."""

    params: Any
    adapters: Any = None
    scale: float = 1.0  # of the adapters


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How the networks are run.

    Attributes:
      matmul_precision: of float32 matmuls: highest, high or default.
      decode_batch: clips that are decoded at a time; divides every batch.
    """

    matmul_precision: str = "highest"
    decode_batch: int = 1


class Sampler:
    """Samples batches of any fixed size; call it under `jax.set_mesh(mesh)`."""

    def __init__(
        self,
        transformer: hunyuan_video.HunyuanVideoConfig,
        vae_config: vae.VaeConfig,
        policy: Policy,
        vae_params: Any,
        negative: conditions.PromptBatch,
        settings: Settings,
        mesh: jax.sharding.Mesh,
        numerics: Numerics | None = None,
    ) -> None:
        """
        Args:
          transformer: config of the DiT.
          vae_config: config of the VAE.
          policy: on the mesh.
          vae_params: on the mesh.
          negative: the one unconditional prompt of guidance.
          settings: see there.
          mesh: the device mesh.
          numerics: see there.
        """
        self._policy, self._vae_params = policy, vae_params
        self._numerics = Numerics() if numerics is None else numerics
        self._rows = sharding.batch_sharding(mesh)
        self._dtype = transformer.dtype
        self._latent_frames = settings.latent_shape(vae_config)[0]
        self._negative = conditions.to_condition(
            negative, sharding.replicated(mesh), self._dtype, self._latent_frames
        )
        precision = self._numerics.matmul_precision
        chain = make_chain(transformer, vae_config, settings, policy.scale, precision)
        self._chain = jax.jit(chain, out_shardings=self._rows)
        self._decode = jax.jit(
            make_decode(vae_config, settings, precision),
            static_argnames="size",
            out_shardings=self._rows,
        )
        self._finite = jax.jit(frames.finite_samples, out_shardings=sharding.replicated(mesh))

    def sample(
        self,
        batch: conditions.PromptBatch,
        key_data: np.ndarray,
        initial_latents: np.ndarray | None = None,
    ) -> jax.Array:
        """Clean latents float32 [B, t, h, w, C], scaled as the transformer makes them.

        Args:
          batch: B prompts; on several processes the rows of others may hold anything.
          key_data: uint32 [B, 2] of `key_data`.
          initial_latents: float32 [B, t, h, w, C] at σ = 1; None draws them from the keys.
        """
        condition = conditions.to_condition(batch, self._rows, self._dtype, self._latent_frames)
        keys = hosts.to_global(key_data, self._rows)
        if initial_latents is not None:
            initial_latents = hosts.to_global(initial_latents, self._rows)
        params, adapters, _ = self._policy
        return self._chain(params, adapters, condition, self._negative, keys, initial_latents)

    def decode(self, latents: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
        """(row, uint8 frames [F, H, W, 3]) of the rows of a batch that this process owns."""
        size = self._numerics.decode_batch
        pieces = latents.shape[0] // size
        for piece in range(pieces):
            frames = self._decode(self._vae_params, latents, piece, size=size)
            for row, clip in hosts.local_rows(frames):
                yield piece + pieces * row, clip

    def finite(self, latents: jax.Array) -> np.ndarray:
        """Which samples hold neither NaN nor infinity; bool [B], on every process."""
        return hosts.to_host(self._finite(latents))


def make_chain(
    transformer: hunyuan_video.HunyuanVideoConfig,
    vae_config: vae.VaeConfig,
    settings: Settings,
    scale: float,
    precision: str,
) -> Callable[..., jax.Array]:
    """(params, adapters, condition [B], negative [1], key data [B], initial) -> latents [B]."""
    schedule, shape = settings.schedule, settings.latent_shape(vae_config)

    def chain(params, adapters, condition, negative, key_data, initial_latents):
        def model(latents, timestep, branch):
            if transformer.use_meanflow:
                branch = branch._replace(timestep_r=schedules.next_timestep(schedule, timestep))
            with jax.default_matmul_precision(precision):
                return hunyuan_video.velocity(
                    params, latents, timestep, branch, transformer, adapters, scale
                )

        guided = guidance.guided(model, settings.guidance, mode=settings.guidance_mode)
        unconditional = conditions.unconditional(condition, negative)
        trajectory = rollout.rollout(
            lambda latents, timestep: guided(latents, timestep, condition, unconditional),
            jax.random.wrap_key_data(key_data, impl="threefry2x32"),
            shape,
            schedule,
            settings.sampler,
            settings.eta,
            settings.stochastic,
            clamp=settings.clamp,
            initial_latents=initial_latents,
        )
        return trajectory.latents[-1]

    return chain


def make_decode(vae_config: vae.VaeConfig, settings: Settings, precision: str):
    """(vae parameters, latents [B], piece int32 [], size) -> uint8 frames [size, F, H, W, 3].

    Piece p holds the samples `p + (B/size)·row`: each takes its share of every device.
    """

    def decode(vae_params, latents, piece, size):
        chunk = latents.reshape(size, -1, *latents.shape[1:])[:, piece]
        return frames.decode_frames(vae_params, chunk, vae_config, settings.tiling, precision)

    return decode


def key_data(seeds: Sequence[int], ids: Sequence[str]) -> np.ndarray:
    """Key data uint32 [B, 2] of B samples: a function of seed and prompt id alone.

    Seed s of a prompt starts from the noise of `noise.sample_keys(s, 0, 0, prompt_hash(id), 0)`:
    with `eval.seed` that of the first evaluation sample of the prompt.
    """
    hashes = np.array([noise.prompt_hash(i) for i in ids], np.uint32)
    out = np.zeros((len(hashes), 2), np.uint32)
    for seed in set(seeds):
        keys = noise.sample_keys(seed, 0, 0, hashes, np.zeros_like(hashes))
        rows = np.asarray(seeds) == seed
        out[rows] = np.asarray(jax.random.key_data(keys))[rows]
    return out
