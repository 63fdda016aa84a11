"""The configuration: frozen dataclasses, filled from a ConfigDict and validated once.

A recipe (configs/*.py) starts from `default_config()`, flags override its fields, and
`builder.from_config_dict` turns the result into the dataclasses below. What a field may hold stands
beside it (`common.fields`); what fields ask of each other is in `checks`. Every error names the
field, the value and what is allowed.
"""

import dataclasses

import ml_collections

from sage_grpo_jax.common.fields import bounded, choice, free, not_empty
from sage_grpo_jax.common.frozen_dict import FrozenDict
from sage_grpo_jax.config import methods
from sage_grpo_jax.flow import guidance as guidance_lib
from sage_grpo_jax.flow import kinds, windows
from sage_grpo_jax.flow import sde as sde_lib
from sage_grpo_jax.grpo import advantage
from sage_grpo_jax.grpo import equalizer as equalizer_lib
from sage_grpo_jax.grpo import loss as loss_lib
from sage_grpo_jax.grpo import trust_region as trust_region_lib
from sage_grpo_jax.models import attention, frames, registry
from sage_grpo_jax.models import lora as lora_lib

_PATH = "a path: opened, or refused by name, before any work"
_PROMPTS = "prompts: read, or refused by name, before any work"
_HIGHEST_SEED = 2**32 - 1
_MOST_STEPS = 1000


def _variants() -> tuple[str, ...]:
    """The released variants, asked for late: it takes all models to know them."""
    return ("", *registry.variants())


def _injecting_kinds() -> tuple[str, ...]:
    return ("", *kinds.stochastic_kinds())


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which networks, and in which numerics."""

    # Folder in diffusers', the authors' or our orbax layout; "asset:NAME" for shipped weights.
    transformer: str = free("", _PATH)
    vae: str = free("", _PATH)
    variant: str = choice("", _variants)  # of a released model, as 480p_t2v; "": another model
    compute_dtype: str = choice("float32", ("float32", "bfloat16"))
    matmul_precision: str = choice("highest", ("highest", "high", "default"))  # of float32 matmuls
    attention: str = choice("auto", attention.IMPLEMENTATIONS)
    remat: bool = True  # recompute each block in the backward pass
    unroll: bool = False  # lay the blocks out instead of scanning them: small models on CPUs
    vae_tiling: str = choice("off", frames.TILINGS)  # decode in overlapping tiles


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """The clips, in pixels."""

    frames: int = bounded(81, least=1)
    height: int = bounded(352, least=1)
    width: int = bounded(624, least=1)
    fps: float = bounded(24.0, above=0)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts: embeddings from `encode_prompts`, or text for the small world's encoder."""

    # cache:FOLDER of encode_prompts; with text_encoder=words also FILE.{txt,csv,jsonl}, or
    # moving_shapes:SPLIT with train | validation | test | held_out (the last two) | all
    train_prompts: str = free("", _PROMPTS)
    # Choices are made on these: while a run trains, and between runs.
    eval_prompts: str = free("", _PROMPTS)
    # What is reported: sampled before and after, never in between; "": none.
    test_prompts: str = free("", _PROMPTS)
    # words: the small world's word embeddings; cache: encoded before.
    text_encoder: str = choice("words", ("words", "cache"))
    # Static length; 0: the smallest bucket that holds every prompt.
    max_text_tokens: int = bounded(16, least=0)


@dataclasses.dataclass(frozen=True)
class EtaMatch:
    """Chooses eta by the noise that another sampler injects: the same sum of variances."""

    kind: str = choice("", _injecting_kinds)  # one that injects noise; "": rollout.eta holds
    eta: float = bounded(0.0, least=0, most=sde_lib.HIGHEST_ETA)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How videos are sampled."""

    sde: str = choice("precise", sde_lib.KINDS)
    eta: float = bounded(0.5, least=0, most=sde_lib.HIGHEST_ETA, unless="eta_match.kind")
    eta_match: EtaMatch = dataclasses.field(default_factory=EtaMatch)
    # How close to σ = 1 precise and flow look, where their variance diverges: 1 - σ >= clamp; 0: as
    # their authors have it.
    clamp: float = bounded(0.0, least=0, most=sde_lib.HIGHEST_CLAMP)
    # The steps that inject noise: all; the first window_size of them; so many in a row, at a random
    # place (the same within a group) or one that moves with the rollouts: progressive, decay,
    # dynamic. The others follow the ODE.
    window: str = choice("all", windows.WINDOWS)
    window_size: int = bounded(0, least=0, most=_MOST_STEPS)
    window_motion: windows.Motion = dataclasses.field(default_factory=windows.Motion)
    # The share of the steps that inject noise at which a sample is trained: the first of them, or
    # random ones of its own.
    trained_fraction: float = bounded(1.0, above=0, most=1)
    trained_choice: str = choice("first", windows.TRAINED_CHOICES)
    same_initial_noise: bool = False  # within a group
    num_steps: int = bounded(20, least=1, most=_MOST_STEPS)
    shift: float = bounded(5.0, least=0.1, most=20)
    guidance: float = bounded(1.0, least=0)
    guidance_mode: str = choice("batch", guidance_lib.MODES)
    last_step: str = choice("deterministic", sde_lib.LAST_STEPS)
    prompts_per_step: int = bounded(16, least=1)
    group_size: int = bounded(4, least=2)
    # Clips decoded at a time; at least one on each shard of the batch.
    decode_batch: int = bounded(16, least=1)


_REWARDS: FrozenDict[str, float] = FrozenDict(VQ=1.0, MQ=1.0, TA=1.0)


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The reward service and what to do when it fails."""

    backend: str = free("moving_shapes", "checked with `spawn`")
    spawn: bool = True  # the trainer starts (and ends) its own server
    address: str = free("", "checked with `spawn`")  # HOST:PORT of a server that runs elsewhere
    timeout_seconds: float = bounded(60.0, above=0)  # of one call
    # Of one clip, with all retries and waiting for the server.
    budget_seconds: float = bounded(900.0, above=0)
    max_in_flight: int = bounded(8, least=1)
    # Of its own server, without any answer to health checks, until it is killed and started again;
    # 0: never. A server that is only busy answers them.
    silence_seconds: float = bounded(60.0, least=0)
    min_valid_fraction: float = bounded(0.75, least=0, most=1)  # below it the update is skipped
    max_skipped_updates: int = bounded(3, least=1)  # so many skips in a row end the run
    # Any rewards of the server by name. With weight 0 one is measured and has no part in training.
    weights: FrozenDict[str, float] = bounded(_REWARDS)

    @property
    def optimised(self) -> dict[str, float]:
        """The weights of the rewards that are optimised; the others are monitored only."""
        return {name: weight for name, weight in self.weights.items() if weight != 0}


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """Group-normalised advantages."""

    epsilon: float = bounded(1e-4, least=0)
    clip: float = bounded(5.0, above=0)
    std_floor: float = bounded(0.0, least=0)  # in reward units
    # What they are divided by: group | group_unbiased (over one less) | global, of all samples.
    std: str = choice("group", advantage.STDS)
    # sum: of the weighted rewards; per_reward: weighted and added afterwards.
    combine: str = choice("sum", advantage.COMBINES)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The policy loss."""

    # nft is on the forward process, see NftConfig.
    objective: str = choice("ppo", (*loss_lib.OBJECTIVES, "nft"))
    clip_range: float = bounded(1e-4, above=0)
    equalizer: bool = True
    median: str = choice("lower", equalizer_lib.MEDIANS)  # of an even number of steps
    log_prob: str = choice("gaussian", sde_lib.LOG_PROBS)
    log_prob_reduction: str = choice("mean", sde_lib.REDUCTIONS)  # over the elements of a sample
    step_reduction: str = choice("mean", ("mean", "sum"))  # over the trained steps
    updates_per_rollout: int = bounded(1, least=1)
    split_updates: bool = False  # each update takes its share of the samples; False: all of them
    # The branches that get a gradient.
    guidance_gradient: str = choice("both", guidance_lib.GRADIENTS)
    micro_batch: int = bounded(16, least=1)  # samples in one forward and backward pass
    # Largest |ratio - 1| before the first update of a rollout; at most a tenth of clip_range.
    ratio_tolerance: float = bounded(1e-6, least=0)
    # Largest distance of the rollout's means from the update's, root mean square over the elements
    # of a sample, in standard deviations of the step; 0: by the precision of the model.
    rollout_tolerance: float = bounded(0.0, least=0, most=1)
    # What happens above one of them; log: the update is applied.
    ratio_action: str = choice("stop", ("stop", "log"))


@dataclasses.dataclass(frozen=True)
class NftConfig:
    """DiffusionNFT: the loss of `loss.objective=nft`, and the policy that samples for it."""

    beta: float = bounded(1.0, above=0)  # of the implicit policies v_old ± beta·(v - v_old)
    adaptive: bool = True  # every sample and noise level weighs about the same
    # The sampling policy is an average of the trained one that keeps min(rate·(n - start), limit)
    # of itself after n updates: at first the trained policy itself.
    decay_start: int = bounded(0, least=0)
    decay_rate: float = bounded(0.001, least=0)
    decay_limit: float = bounded(0.5, least=0, below=1)


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """A moving average of the policy, part of the checkpoints; evaluated on request."""

    # At most, min(decay, (1 + n)/(10 + n)) after n updates; 0: no average.
    decay: float = bounded(0.0, least=0, below=1)
    every: int = bounded(1, least=1)  # applied updates from one step of the average to the next


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon behind a global-norm clip."""

    name: str = choice("adamw", ("adamw", "muon"))  # muon: matrices by Muon, vectors by AdamW
    learning_rate: float = bounded(1e-5, above=0)
    warmup_steps: int = bounded(0, least=0)
    # After the warm-up, over num_steps.
    schedule: str = choice("constant", ("constant", "linear", "cosine"))
    # Of the learning rate, at the end of linear and cosine.
    final_fraction: float = bounded(0.0, least=0, most=1)
    momentum: float = bounded(0.95, least=0, below=1)  # of Muon
    newton_schulz_steps: int = bounded(5, least=1, most=20)
    b1: float = bounded(0.9, least=0, below=1)
    b2: float = bounded(0.999, least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(0.0, least=0)
    grad_clip: float = bounded(1.0, above=0)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning."""

    rank: int = bounded(0, least=0)  # 0: all weights are trained
    alpha: float = bounded(0.0, least=0)  # adapters are scaled by alpha / rank; 0: alpha = 2 * rank
    # Or paths: blocks/image/query.
    targets: str = free(",".join(lora_lib.TARGETS), "checked with the rank, by `adapters`")
    # Folder or file of adapters that the run starts from; "": fresh ones.
    init: str = free("", _PATH)
    # Of the frozen weights; auto: the compute dtype.
    base_dtype: str = choice("auto", ("auto", "float32", "bfloat16"))
    learning_rate: float = bounded(0.0, least=0)  # 0: that of the optimizer

    @property
    def adapters(self) -> lora_lib.LoraConfig | None:
        """Rank, scale and targets; None without adapters."""
        if self.rank == 0:
            return None
        alpha = self.alpha or 2.0 * self.rank
        return lora_lib.LoraConfig(self.rank, alpha, tuple(self.targets.split(",")))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The evaluation on fixed prompts and seeds."""

    every: int = bounded(50, least=0)  # 0: only at the start and at the end
    weights: str = choice("trained", ("trained", "ema"))  # whose videos are scored
    num_prompts: int = bounded(32, least=1)
    num_test_prompts: int = bounded(0, least=0)  # of data.test_prompts; 0: all of them
    # From 2 on the diversity within a prompt is measured.
    samples_per_prompt: int = bounded(1, least=1)
    num_steps: int = bounded(20, least=1, most=_MOST_STEPS)
    seed: int = bounded(12345, least=0, most=_HIGHEST_SEED)
    manifold_distance: bool = False  # only the moving-shapes world knows its manifold
    shape_identity: bool = False  # how often its captioned shape is seen: of that world too
    # The first prompts, one clip of each, in contact sheet and animation.
    sheet_prompts: int = bounded(8, least=0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = bounded(20, least=1)
    keep: int = bounded(2, least=1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1: the rest."""

    data: int = bounded(1, least=-1)
    fsdp: int = bounded(-1, least=-1)
    context: int = bounded(1, least=-1)


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """Checks that cost time."""

    shadow: bool = False  # recompute one micro-batch a step in float64 on the CPU


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = not_empty("sage_grpo", "a name for the run")
    # The preset in place, from the recipe's argument.
    method: str = choice(methods.Applied("sage"), methods.METHODS)
    seed: int = bounded(0, least=0, most=_HIGHEST_SEED)
    num_steps: int = bounded(100, least=1)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    video: VideoConfig = dataclasses.field(default_factory=VideoConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    nft: NftConfig = dataclasses.field(default_factory=NftConfig)
    trust_region: trust_region_lib.TrustRegionConfig = dataclasses.field(
        default_factory=trust_region_lib.TrustRegionConfig
    )
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    debug: DebugConfig = dataclasses.field(default_factory=DebugConfig)

    @property
    def batch_size(self) -> int:
        """Samples of one rollout: prompts × group."""
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def learning_rate(self) -> float:
        """Of what is trained: the adapters where there are any."""
        return (self.lora.rank and self.lora.learning_rate) or self.optimizer.learning_rate

    @property
    def averages(self) -> tuple[str, ...]:
        """The moving averages that the learner's state has, see `state.AVERAGES`."""
        kept = {"ema": self.ema.decay > 0, "sampling": self.loss.objective == "nft"}
        return tuple(name for name, wanted in kept.items() if wanted)


def default_config() -> ml_collections.ConfigDict:
    """Every field of `Config` with its default, locked, for recipes to start from."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()
