"""How a policy samples: embeddings and noise keys in, latents out; latents in, frames out.

`make_rollout` and `make_decode` make the functions that training, evaluation and `sample` compile.
`Sampler` is both of them compiled, each once a shape, for batches of prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sage_grpo_jax.flow import noise, schedules
from sage_grpo_jax.flow import rollout as rollout_lib
from sage_grpo_jax.models import frames
from sage_grpo_jax.models.door import AutoencoderConfig, TransformerConfig
from sage_grpo_jax.parallel import hosts, sharding
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy.policy import Guidance, Policy, guided_velocity


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
      schedule: of T steps.
      latent_shape: frames, height, width, channels of the latents of one clip.
      kind: of the stochastic steps, see `flow.sde`.
      eta: their noise level.
      clamp: see `flow.sde.step_coefficients`.
      stochastic: bool [T], the steps that inject noise; None: none does.
      guidance: see there.
      tiling: how the VAE decodes, one of `frames.TILINGS`.
    """

    schedule: schedules.Schedule
    latent_shape: tuple[int, int, int, int]
    kind: str = "ode"
    eta: float = 0.0
    clamp: float = 0.0
    stochastic: np.ndarray | None = None
    guidance: Guidance = dataclasses.field(default_factory=Guidance)
    tiling: str = "off"


def make_rollout(
    transformer: TransformerConfig, sampling: Sampling
) -> Callable[..., rollout_lib.Trajectory]:
    """(policy, condition [B], negative [1] or None, keys [B]) -> Trajectory of B samples.

    The function also takes `stochastic`, bool [T, B] where samples differ, in place of that of
    `sampling`; `initial_latents` float32 [B, t, h, w, C], in place of those of the keys; and
    `flat`, see `flow.rollout.rollout`.
    """
    usual = sampling.stochastic
    if usual is None:
        usual = np.zeros(len(sampling.schedule.timesteps), bool)

    def rollout(
        policy: Policy,
        condition: Any,
        negative: Any,
        keys: jax.Array,
        *,
        stochastic: Any = None,
        initial_latents: jax.Array | None = None,
        flat: bool = False,
    ) -> rollout_lib.Trajectory:
        velocity = guided_velocity(
            policy, transformer, condition, negative, sampling.schedule, sampling.guidance
        )

        return rollout_lib.rollout(
            velocity,
            keys,
            sampling.latent_shape,
            sampling.schedule,
            sampling.kind,
            sampling.eta,
            usual if stochastic is None else stochastic,
            clamp=sampling.clamp,
            initial_latents=initial_latents,
            flat=flat,
        )

    return rollout


def make_decode(
    vae_config: AutoencoderConfig, tiling: str, precision: str
) -> Callable[..., jax.Array]:
    """(vae parameters, latents [B], piece int32 [], size) -> uint8 frames [size, F, H, W, 3].

    Piece p holds the samples `p + (B/size)·row`: each takes its share of every device.
    """

    def decode(vae_params: Any, latents: jax.Array, piece: Any, size: int) -> jax.Array:
        # [B, ...] -> [size, n, ...] -> [size, ...]: every device decodes its share of every piece,
        # and no latents travel; see `update.split_batch`.
        chunk = latents.reshape(size, -1, *latents.shape[1:])[:, piece]
        return frames.decode_frames(vae_params, chunk, vae_config, tiling, precision)

    return decode


class Sampler:
    """Samples batches of any fixed size; call it under `jax.set_mesh(mesh)`.

    Args:
      transformer: config of the transformer.
      vae_config: config of the VAE.
      policy: on the mesh.
      vae_params: on the mesh.
      negative: the one unconditional prompt of guidance.
      sampling: see there.
      mesh: the device mesh.
      decode_batch: clips that are decoded at a time; divides every batch.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        vae_config: AutoencoderConfig,
        policy: Policy,
        vae_params: Any,
        negative: conditions.PromptBatch,
        sampling: Sampling,
        mesh: jax.sharding.Mesh,
        decode_batch: int = 1,
    ) -> None:
        self._policy, self._vae_params = policy, vae_params
        self._transformer, self._decode_batch = transformer, decode_batch
        self._rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._latent_frames = sampling.latent_shape[0]
        self._negative = self._condition(negative, whole)

        rollout = make_rollout(transformer, sampling)

        def chain(
            policy: Policy,
            condition: Any,
            negative: Any,
            key_data: jax.Array,
            initial_latents: jax.Array | None,
        ) -> jax.Array:
            # Bits come in, not typed keys: each process may fill its own rows of a plain array.
            keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
            path = rollout(policy, condition, negative, keys, initial_latents=initial_latents)
            return path.latents[-1]

        self._chain = jax.jit(chain, out_shardings=self._rows)
        decode = make_decode(vae_config, sampling.tiling, sampling.guidance.precision)
        self._decode = jax.jit(decode, static_argnames="size", out_shardings=self._rows)
        self._finite = jax.jit(frames.finite_samples, out_shardings=whole)

    def sample(
        self,
        batch: conditions.PromptBatch,
        key_data: np.ndarray,
        initial_latents: np.ndarray | None = None,
    ) -> jax.Array:
        """Clean latents float32 [B, t, h, w, C], in the units of the transformer.

        Args:
          batch: B prompts; on several processes the rows of others may hold anything.
          key_data: uint32 [B, 2] of `key_data`.
          initial_latents: float32 [B, t, h, w, C] at σ = 1; None draws them from the keys.
        """
        condition = self._condition(batch, self._rows)
        keys = hosts.to_global(key_data, self._rows)
        if initial_latents is not None:
            initial_latents = hosts.to_global(initial_latents, self._rows)
        return self._chain(self._policy, condition, self._negative, keys, initial_latents)

    def decode(self, latents: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
        """(row, uint8 frames [F, H, W, 3]) of the rows of a batch that this process owns."""
        pieces = latents.shape[0] // self._decode_batch
        for piece in range(pieces):
            frames = self._decode(self._vae_params, latents, piece, size=self._decode_batch)
            for row, clip in hosts.local_rows(frames):
                # Row r of piece p is clip p + n·r of the batch, see `make_decode`.
                yield piece + pieces * row, clip

    def finite(self, latents: jax.Array) -> np.ndarray:
        """Which samples hold neither NaN nor infinity; bool [B], on every process."""
        return hosts.to_host(self._finite(latents))

    def _condition(self, batch: conditions.PromptBatch, place: jax.sharding.Sharding) -> Any:
        return conditions.to_condition(batch, place, self._transformer, self._latent_frames)


def key_data(seeds: Sequence[int], ids: Sequence[str]) -> np.ndarray:
    """Key data uint32 [B, 2] of B samples: a function of seed and prompt id alone.

    Seed s of a prompt starts from the noise of `noise.sample_keys(s, 0, 0, prompt_hash(id), 0)`:
    with `eval.seed` that of the first evaluation sample of the prompt.
    """
    hashes = np.array([noise.prompt_hash(i) for i in ids], np.uint32)
    # Keys that are made at once have one seed, so they are made seed by seed.
    out = np.zeros((len(hashes), 2), np.uint32)
    for seed in set(seeds):
        keys = noise.sample_keys(seed, 0, 0, hashes, np.zeros_like(hashes))
        rows = np.asarray(seeds) == seed
        out[rows] = np.asarray(jax.random.key_data(keys))[rows]
    return out
