"""The configuration: frozen dataclasses, filled from a ConfigDict and validated once.

A recipe (configs/*.py) starts from `default_config()`, flags override its fields, and
`from_config_dict` turns the result into the dataclasses below. Every error names the field, the
value and what is allowed.
"""

import dataclasses
import math
import types
import typing
from typing import Any

import ml_collections

from sage_grpo_jax.data import moving_shapes_spec as spec
from sage_grpo_jax.grpo import trust_region as trust_region_lib

SDE_KINDS = ("precise", "flow", "dance", "cps", "ode")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which networks, and in which numerics."""

    transformer: str = ""  # folder with config.json and safetensors; "asset:NAME" for shipped ones
    vae: str = ""
    compute_dtype: str = "float32"  # float32 | bfloat16
    matmul_precision: str = "highest"  # highest | high | default: of float32 matmuls
    attention: str = "auto"  # auto | splash | cudnn | xla
    remat: bool = True  # recompute each block in the backward pass
    unroll: bool = False  # lay the blocks out instead of scanning them: small models on CPUs


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """The clips, in pixels."""

    frames: int = 81
    height: int = 352
    width: int = 624
    fps: float = 24.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts: a text file, or the captions of the moving-shapes world."""

    train_prompts: str = ""  # FILE.{txt,csv,jsonl}, or moving_shapes:train | moving_shapes:held_out
    eval_prompts: str = ""
    text_encoder: str = "words"  # words: the deterministic word embeddings of the small world
    max_text_tokens: int = 16


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How videos are sampled."""

    sde: str = "precise"
    eta: float = 0.5
    num_steps: int = 20
    shift: float = 5.0
    guidance: float = 1.0
    guidance_mode: str = "batch"  # batch | sequential
    last_step: str = "deterministic"  # deterministic | stochastic
    prompts_per_step: int = 16
    group_size: int = 4
    decode_batch: int = 16  # clips decoded at a time; at least one on each shard of the batch


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """The weights of the dimensions in the reward that is optimised."""

    VQ: float = 1.0
    MQ: float = 1.0
    TA: float = 1.0


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The reward service and what to do when it fails."""

    backend: str = "moving_shapes"
    spawn: bool = True  # the trainer starts (and ends) its own server
    address: str = ""  # HOST:PORT of a server that runs elsewhere
    timeout_seconds: float = 60.0  # of one call
    budget_seconds: float = 900.0  # of one clip, with all retries and waiting for the server
    max_in_flight: int = 8
    min_valid_fraction: float = 0.75  # below it the update is skipped
    max_skipped_updates: int = 3  # so many skips in a row end the run
    weights: RewardWeights = dataclasses.field(default_factory=RewardWeights)


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """Group-normalised advantages."""

    epsilon: float = 1e-4
    clip: float = 5.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The policy loss."""

    objective: str = "ppo"  # ppo | reinforce
    clip_range: float = 1e-4
    equalizer: bool = True
    log_prob: str = "gaussian"  # gaussian | squared
    updates_per_rollout: int = 1
    micro_batch: int = 16  # samples in one forward and backward pass
    ratio_tolerance: float = 1e-6  # largest |ratio - 1| before the first update of a rollout
    ratio_action: str = "stop"  # stop | replay | log: what happens above it


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW behind a global-norm clip."""

    name: str = "adamw"
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The evaluation on fixed prompts and seeds."""

    every: int = 50  # 0: only at the start and at the end
    num_prompts: int = 32
    samples_per_prompt: int = 1
    num_steps: int = 20
    seed: int = 12345
    manifold_distance: bool = False  # only the moving-shapes world knows its manifold
    sheet_prompts: int = 8  # clips in the contact sheet and the animation


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 20
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1: the rest."""

    data: int = 1
    fsdp: int = -1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "sage_grpo"
    method: str = "sage"
    seed: int = 0
    num_steps: int = 100
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    video: VideoConfig = dataclasses.field(default_factory=VideoConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    trust_region: trust_region_lib.TrustRegionConfig = dataclasses.field(
        default_factory=trust_region_lib.TrustRegionConfig
    )
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    @property
    def batch_size(self) -> int:
        """Samples of one rollout: prompts × group."""
        return self.rollout.prompts_per_step * self.rollout.group_size


def default_config() -> ml_collections.ConfigDict:
    """Every field of `Config` with its default, locked, for recipes to start from."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """The validated dataclasses of a ConfigDict.

    Raises:
      ValueError: unknown or missing field, wrong type, value out of range.
    """
    result = _build(Config, config.to_dict(), "config")
    validate(result)
    return result


def _build(cls: type, values: Any, path: str) -> Any:
    """The dataclass `cls` from a nested dict, with the types of its annotations checked."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {values!r}; allowed: a group of fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{path}.{unknown[0]}: unknown field; allowed: {', '.join(fields)}")
    if missing := sorted(set(fields) - set(values)):
        raise ValueError(f"{path}.{missing[0]}: missing")
    hints = typing.get_type_hints(cls)
    return cls(**{n: _convert(hints[n], values[n], f"{path}.{n}") for n in fields})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type, or an error; only int -> float is converted."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int in Python; a flag in place of a number is a mistake.
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(
            f"{path}: got {value!r} ({type(value).__name__}); allowed: {hint.__name__}"
        )
    return value


_CHOICES = {
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.matmul_precision": ("highest", "high", "default"),
    "model.attention": ("auto", "splash", "cudnn", "xla"),
    "data.text_encoder": ("words",),
    "rollout.sde": SDE_KINDS,
    "rollout.guidance_mode": ("batch", "sequential"),
    "rollout.last_step": ("deterministic", "stochastic"),
    "loss.objective": ("ppo", "reinforce"),
    "loss.log_prob": ("gaussian", "squared"),
    "loss.ratio_action": ("stop", "replay", "log"),
    "optimizer.name": ("adamw",),
}
# field -> (lowest, highest); None: no bound.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "num_steps": (1, None),
    "seed": (0, 2**32 - 1),
    "video.frames": (1, None),
    "video.height": (1, None),
    "video.width": (1, None),
    "data.max_text_tokens": (1, None),
    "rollout.eta": (0, 2),
    "rollout.num_steps": (1, 1000),
    "rollout.shift": (0.1, 20),
    "rollout.guidance": (0, None),
    "rollout.prompts_per_step": (1, None),
    "rollout.group_size": (2, None),
    "rollout.decode_batch": (1, None),
    "rewards.budget_seconds": (0, None),
    "rewards.max_in_flight": (1, None),
    "rewards.min_valid_fraction": (0, 1),
    "rewards.max_skipped_updates": (1, None),
    "advantage.epsilon": (0, None),
    "loss.updates_per_rollout": (1, None),
    "loss.micro_batch": (1, None),
    "loss.ratio_tolerance": (0, None),
    "optimizer.warmup_steps": (0, None),
    "optimizer.weight_decay": (0, None),
    "eval.every": (0, None),
    "eval.num_prompts": (1, None),
    "eval.samples_per_prompt": (1, None),
    "eval.num_steps": (1, 1000),
    "eval.seed": (0, 2**32 - 1),
    "eval.sheet_prompts": (0, None),
    "checkpoint.every": (1, None),
    "checkpoint.keep": (1, None),
}
_POSITIVE = (
    "video.fps",
    "rewards.timeout_seconds",
    "advantage.clip",
    "loss.clip_range",
    "optimizer.learning_rate",
    "optimizer.grad_clip",
    "optimizer.eps",
)


def _get(config: Config, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def validate(config: Config) -> None:
    """Checks every field by itself, then those that depend on each other.

    Raises:
      ValueError: with the field, its value and what is allowed.
    """
    for path, allowed in _CHOICES.items():
        if (value := _get(config, path)) not in allowed:
            raise ValueError(f"config.{path}: got {value!r}; allowed: {', '.join(allowed)}")
    for path, (low, high) in _RANGES.items():
        value = _get(config, path)
        # Written so that NaN and infinity fail.
        if not (
            (low is None or value >= low) and value < math.inf and (high is None or value <= high)
        ):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"config.{path}: got {value}; allowed: {bounds}")
    for path in _POSITIVE:
        if not 0 < (value := _get(config, path)) < math.inf:
            raise ValueError(f"config.{path}: got {value}; allowed: greater than 0 and finite")
    _validate_together(config)


def _validate_together(config: Config) -> None:
    rollout = config.rollout
    if rollout.sde == "ode" or rollout.eta == 0:
        raise ValueError(
            f"config.rollout: sde={rollout.sde!r} with eta={rollout.eta} samples without noise, "
            "so there is nothing to learn from; allowed: precise, flow, dance or cps with eta > 0"
        )
    if rollout.sde == "cps" and rollout.eta > 1:
        raise ValueError(f"config.rollout.eta: got {rollout.eta}; allowed with sde=cps: 0 to 1")
    if config.batch_size % config.loss.micro_batch:
        raise ValueError(
            f"config.loss.micro_batch: got {config.loss.micro_batch}; allowed: a divisor of "
            f"prompts_per_step × group_size = {config.batch_size}"
        )
    if config.batch_size % rollout.decode_batch:
        raise ValueError(
            f"config.rollout.decode_batch: got {rollout.decode_batch}; allowed: a divisor of "
            f"prompts_per_step × group_size = {config.batch_size}"
        )
    clip = (config.video.frames, config.video.height, config.video.width)
    world = (spec.NUM_FRAMES, spec.HEIGHT, spec.WIDTH)
    if config.eval.manifold_distance and clip != world:
        raise ValueError(
            f"config.eval.manifold_distance: got True with clips of {clip}; allowed: clips of the "
            f"moving-shapes world, {world}, or False"
        )
    if bool(config.rewards.address) == config.rewards.spawn:
        raise ValueError(
            f"config.rewards: spawn={config.rewards.spawn} with address="
            f"{config.rewards.address!r}; allowed: spawn=True without an address, or "
            "spawn=False with the HOST:PORT of a running server"
        )
