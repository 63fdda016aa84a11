"""The constants of a run: networks' configs, schedule, trained steps and their weights."""

import dataclasses

import jax
import numpy as np

from sage_grpo_jax.flow import schedules, sde
from sage_grpo_jax.grpo import equalizer
from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import config as config_lib


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The constants of the programs: networks' configs, schedule, trained steps and weights."""

    config: config_lib.Config
    transformer: hunyuan_video.HunyuanVideoConfig
    vae: vae.VaeConfig
    schedule: schedules.Schedule
    trained: np.ndarray  # bool [T]: steps that may be stochastic, and are then trained
    weights: np.ndarray  # float32 [T]: S_t, or 1 without the equalizer
    positions: int  # how many steps of a sample are trained; fewer than `trained` with random_k

    @property
    def window_places(self) -> int:
        """At how many places the window of trained steps may start; 1 unless random."""
        return int(self.trained.sum()) - self.positions + 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Frames, height, width, channels of one latent clip."""
        video = self.config.video
        return (
            (video.frames - 1) // self.vae.temporal_compression_ratio + 1,
            video.height // self.vae.spatial_compression_ratio,
            video.width // self.vae.spatial_compression_ratio,
            self.vae.latent_channels,
        )


def make_recipe(
    config: config_lib.Config,
    transformer: hunyuan_video.HunyuanVideoConfig,
    vae_config: vae.VaeConfig,
) -> Recipe:
    """Works out schedule, trained steps and time weights; checks the clip against the networks.

    Raises:
      ValueError: clip sizes that the VAE cannot make, networks that do not fit each other, or a
        schedule without a single stochastic step.
    """
    _check_sizes(config.video, vae_config)
    if transformer.out_channels != vae_config.latent_channels:
        raise ValueError(
            f"config.model: the transformer makes {transformer.out_channels} latent channels, "
            f"the VAE decodes {vae_config.latent_channels}; allowed: networks that fit"
        )
    schedule, trained, positions = trained_steps(config)
    weights = step_weights(config, schedule, trained)
    return Recipe(config, transformer, vae_config, schedule, trained, weights, positions)


def trained_steps(config: config_lib.Config) -> tuple[schedules.Schedule, np.ndarray, int]:
    """(schedule, steps that may be trained bool [T], how many of them each sample trains).

    Raises:
      ValueError: there is no stochastic step.
    """
    rollout = config.rollout
    schedule = schedules.make_schedule(rollout.num_steps, rollout.shift)
    trained = sde.stochastic_steps(rollout.sde, schedule, rollout.eta, last_step=rollout.last_step)
    if not trained.any():
        raise ValueError(
            f"config.rollout: num_steps={rollout.num_steps}, sde={rollout.sde!r}, "
            f"last_step={rollout.last_step!r} leaves no stochastic step to train; allowed: more "
            "steps, or last_step=stochastic"
        )
    positions = min(rollout.window_size or len(trained), int(trained.sum()))
    if rollout.window == "first_k":
        trained[np.flatnonzero(trained)[positions:]] = False
    return schedule, trained, positions


def step_weights(
    config: config_lib.Config, schedule: schedules.Schedule, trained: np.ndarray
) -> np.ndarray:
    """S_t of every step; float32 [T]."""
    rollout, loss = config.rollout, config.loss
    if not loss.equalizer:
        return np.asarray(equalizer.uniform_weights(rollout.sde, schedule, rollout.eta, trained))
    return np.asarray(
        equalizer.equalizer_weights(
            rollout.sde,
            schedule,
            rollout.eta,
            trained,
            median=loss.median,
            log_prob=loss.log_prob,
        )
    )


def _check_sizes(video: config_lib.VideoConfig, vae_config: vae.VaeConfig) -> None:
    temporal, spatial = vae_config.temporal_compression_ratio, vae_config.spatial_compression_ratio
    if (video.frames - 1) % temporal:
        raise ValueError(
            f"config.video.frames: got {video.frames}; allowed: 1 + a multiple of {temporal}"
        )
    for name in ("height", "width"):
        if getattr(video, name) % spatial:
            raise ValueError(
                f"config.video.{name}: got {getattr(video, name)}; allowed: a multiple of {spatial}"
            )


def check_mesh(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
    """Checks that every batch divides over the mesh.

    Raises:
      ValueError: with the field and what is allowed.
    """
    shards = mesh_lib.batch_shards(mesh)
    for path, value in (
        ("loss.micro_batch", config.loss.micro_batch),
        ("rollout.decode_batch", decode_batch(config, mesh)),
    ):
        if value % shards:
            raise ValueError(
                f"config.{path}: got {value}; allowed: a multiple of data × fsdp = {shards}"
            )


def decode_batch(config: config_lib.Config, mesh: jax.sharding.Mesh) -> int:
    """Clips that are decoded at a time: what the recipe says, but at least one on each shard."""
    return max(config.rollout.decode_batch, mesh_lib.batch_shards(mesh))
