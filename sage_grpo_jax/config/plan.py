"""The constants of a run: networks' configs, schedule, trained steps and their weights."""

import dataclasses

import jax
import numpy as np

from sage_grpo_jax.config import schema, step_plan
from sage_grpo_jax.flow import schedules
from sage_grpo_jax.grpo import equalizer
from sage_grpo_jax.models import frames
from sage_grpo_jax.models.door import AutoencoderConfig, TransformerConfig
from sage_grpo_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Plan:
    """The constants of the programs: networks' configs, schedule, trained steps and weights."""

    config: schema.Config
    transformer: TransformerConfig
    vae: AutoencoderConfig
    steps: step_plan.StepPlan
    weights: np.ndarray  # float32 [T]: S_t, or 1 without the equalizer
    kl_weights: np.ndarray  # float32 [T]: of the KLs to the references

    @property
    def schedule(self) -> schedules.Schedule:
        """Of the rollout."""
        return self.steps.schedule

    @property
    def trained(self) -> np.ndarray:
        """The steps that are trained, in some rollout; bool [T]."""
        return self.steps.trained

    @property
    def positions(self) -> int:
        """How many steps of a sample are trained."""
        return self.steps.positions

    @property
    def is_forward(self) -> bool:
        """Whether the loss is that of the forward process, on clean samples."""
        return self.config.loss.objective == "nft"

    @property
    def summed_elements(self) -> int:
        """Elements of a sample over which log-probabilities and KLs are summed; 1: the mean."""
        summed = self.config.loss.log_prob_reduction == "sum"
        return int(np.prod(self.latent_shape)) if summed else 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Frames, height, width, channels of one latent clip."""
        video = self.config.video
        return frames.latent_shape(self.vae, video.frames, video.height, video.width)


def make_plan(
    config: schema.Config,
    transformer: TransformerConfig,
    vae_config: AutoencoderConfig,
) -> Plan:
    """Works out schedule, trained steps and time weights; checks the clip against the networks.

    Raises:
      ValueError: clip sizes that the VAE cannot make, networks that do not fit each other, or a
        schedule without a single stochastic step.
    """
    video = config.video
    frames.check_clip(
        transformer,
        vae_config,
        video.frames,
        video.height,
        video.width,
        lambda field: f"config.video.{field}",
    )

    if config.lora.rank > transformer.hidden_size:
        raise ValueError(
            f"config.lora.rank: got {config.lora.rank}; allowed: at most the width of the "
            f"transformer, {transformer.hidden_size}"
        )
    if transformer.out_channels != vae_config.latent_channels:
        raise ValueError(
            f"config.model: the transformer makes {transformer.out_channels} latent channels, "
            f"the VAE decodes {vae_config.latent_channels}; allowed: networks that fit"
        )

    steps = step_plan.plan_steps(config)
    weights, kl_weights = step_weights(config, steps), step_kl_weights(config, steps)
    return Plan(config, transformer, vae_config, steps, weights, kl_weights)


def step_weights(config: schema.Config, steps: step_plan.StepPlan) -> np.ndarray:
    """S_t of every step, 0 where nothing is trained; float32 [T]."""
    if not config.loss.equalizer:
        return steps.trained.astype(np.float32)
    return _equalized(config, steps, config.loss.log_prob)


def step_kl_weights(config: schema.Config, steps: step_plan.StepPlan) -> np.ndarray:
    """The weight of every step in the KLs, see `TrustRegionConfig.kl_time_weight`; float32 [T]."""
    kind, trained = config.trust_region.kl_time_weight, steps.trained.astype(np.float32)
    if kind == "equalized":
        # Whatever the form of the log-probability, the KL is that of the Gaussian transitions.
        return _equalized(config, steps, "gaussian") ** 2
    if kind == "step_length":
        # The length of a step is σ - σ'; diff is negative, as the schedule falls.
        return trained * -np.diff(np.asarray(steps.schedule.sigmas, np.float64)).astype(np.float32)
    return trained


def _equalized(config: schema.Config, steps: step_plan.StepPlan, log_prob: str) -> np.ndarray:
    rollout = config.rollout
    return np.asarray(
        equalizer.equalizer_weights(
            rollout.sde,
            steps.schedule,
            rollout.eta,
            steps.trained,
            median=config.loss.median,
            log_prob=log_prob,
            clamp=rollout.clamp,
        )
    )


def check_mesh(config: schema.Config, mesh: jax.sharding.Mesh) -> None:
    """Checks that every batch divides over the mesh.

    Raises:
      ValueError: with the field and what is allowed.
    """
    shards = mesh_lib.batch_shards(mesh)
    for path, value in _divided(config, shards).items():
        if value % shards:
            raise ValueError(
                f"config.{path}: got {value}; allowed: a multiple of data × fsdp = {shards}"
            )


def fits(config: schema.Config, shards: int) -> bool:
    """Whether every batch can be cut into so many pieces."""
    return not any(value % shards for value in _divided(config, shards).values())


def _divided(config: schema.Config, shards: int) -> dict[str, int]:
    """The batches that are divided over the mesh, by field."""
    decoded = max(config.rollout.decode_batch, shards)
    return {"loss.micro_batch": config.loss.micro_batch, "rollout.decode_batch": decoded}


def decode_batch(config: schema.Config, mesh: jax.sharding.Mesh) -> int:
    """Clips that are decoded at a time: what the recipe says, but at least one on each shard."""
    return _divided(config, mesh_lib.batch_shards(mesh))["rollout.decode_batch"]
