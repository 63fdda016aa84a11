"""The configuration: frozen dataclasses, filled from a ConfigDict and validated once.

A recipe (configs/*.py) starts from `default_config()`, flags override its fields, and
`builder.from_config_dict` turns the result into the dataclasses below. Every error names the field,
the value and what is allowed.
"""

import dataclasses

import ml_collections

from sage_grpo_jax.common.frozen_dict import FrozenDict
from sage_grpo_jax.config import methods
from sage_grpo_jax.flow import windows
from sage_grpo_jax.grpo import trust_region as trust_region_lib
from sage_grpo_jax.models import lora as lora_lib


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which networks, and in which numerics."""

    # Folder in diffusers', the authors' or our orbax layout; "asset:NAME" for shipped weights.
    transformer: str = ""
    vae: str = ""
    variant: str = ""  # of a released model, as 480p_t2v; "": another model
    compute_dtype: str = "float32"  # float32 | bfloat16
    matmul_precision: str = "highest"  # highest | high | default: of float32 matmuls
    attention: str = "auto"  # auto | splash | cudnn | xla
    remat: bool = True  # recompute each block in the backward pass
    unroll: bool = False  # lay the blocks out instead of scanning them: small models on CPUs
    vae_tiling: str = "off"  # off | official | diffusers: decode in overlapping tiles


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """The clips, in pixels."""

    frames: int = 81
    height: int = 352
    width: int = 624
    fps: float = 24.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts: embeddings from `encode_prompts`, or text for the small world's encoder."""

    # cache:FOLDER of encode_prompts; with text_encoder=words also FILE.{txt,csv,jsonl}, or
    # moving_shapes:SPLIT with train | validation | test | held_out (the last two) | all
    train_prompts: str = ""
    eval_prompts: str = ""  # choices are made on these: while a run trains, and between runs
    test_prompts: str = ""  # what is reported: sampled before and after, never in between; "": none
    text_encoder: str = "words"  # words: the small world's word embeddings; cache: encoded before
    max_text_tokens: int = 16  # static length; 0: the smallest bucket that holds every prompt


@dataclasses.dataclass(frozen=True)
class EtaMatch:
    """Chooses eta by the noise that another sampler injects: the same sum of variances."""

    kind: str = ""  # one that injects noise; "": rollout.eta holds
    eta: float = 0.0


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How videos are sampled."""

    sde: str = "precise"
    eta: float = 0.5
    eta_match: EtaMatch = dataclasses.field(default_factory=EtaMatch)
    # How close to σ = 1 precise and flow look, where their variance diverges: 1 - σ >= clamp; 0: as
    # their authors have it.
    clamp: float = 0.0
    # The steps that inject noise: all; the first window_size of them; so many in a row, at a random
    # place (the same within a group) or one that moves with the rollouts: progressive, decay,
    # dynamic. The others follow the ODE.
    window: str = "all"
    window_size: int = 0
    window_motion: windows.Motion = dataclasses.field(default_factory=windows.Motion)
    # The share of the steps that inject noise at which a sample is trained: the first of them, or
    # random ones of its own.
    trained_fraction: float = 1.0
    trained_choice: str = "first"  # first | random
    same_initial_noise: bool = False  # within a group
    num_steps: int = 20
    shift: float = 5.0
    guidance: float = 1.0
    guidance_mode: str = "batch"  # batch | sequential
    last_step: str = "deterministic"  # deterministic | stochastic
    prompts_per_step: int = 16
    group_size: int = 4
    decode_batch: int = 16  # clips decoded at a time; at least one on each shard of the batch


_REWARDS: FrozenDict[str, float] = FrozenDict(VQ=1.0, MQ=1.0, TA=1.0)


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The reward service and what to do when it fails."""

    backend: str = "moving_shapes"
    spawn: bool = True  # the trainer starts (and ends) its own server
    address: str = ""  # HOST:PORT of a server that runs elsewhere
    timeout_seconds: float = 60.0  # of one call
    budget_seconds: float = 900.0  # of one clip, with all retries and waiting for the server
    max_in_flight: int = 8
    # Of its own server, without any answer to health checks, until it is killed and started again;
    # 0: never. A server that is only busy answers them.
    silence_seconds: float = 60.0
    min_valid_fraction: float = 0.75  # below it the update is skipped
    max_skipped_updates: int = 3  # so many skips in a row end the run
    # Any rewards of the server by name. With weight 0 one is measured and has no part in training.
    weights: FrozenDict[str, float] = _REWARDS

    @property
    def optimised(self) -> dict[str, float]:
        """The weights of the rewards that are optimised; the others are monitored only."""
        return {name: weight for name, weight in self.weights.items() if weight != 0}


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """Group-normalised advantages."""

    epsilon: float = 1e-4
    clip: float = 5.0
    std_floor: float = 0.0  # in reward units
    # What they are divided by: group | group_unbiased (over one less) | global, of all samples.
    std: str = "group"
    combine: str = "sum"  # sum, of the weighted rewards | per_reward: weighted and added afterwards


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The policy loss."""

    objective: str = "ppo"  # ppo | reinforce | nft (on the forward process, see NftConfig)
    clip_range: float = 1e-4
    equalizer: bool = True
    median: str = "lower"  # lower | mean: of an even number of steps
    log_prob: str = "gaussian"  # gaussian | squared
    log_prob_reduction: str = "mean"  # mean | sum, over the elements of a sample
    step_reduction: str = "mean"  # mean | sum, over the trained steps
    updates_per_rollout: int = 1
    split_updates: bool = False  # each update takes its share of the samples; False: all of them
    guidance_gradient: str = "both"  # both | condition: the branches that get a gradient
    micro_batch: int = 16  # samples in one forward and backward pass
    # Largest |ratio - 1| before the first update of a rollout; at most a tenth of clip_range.
    ratio_tolerance: float = 1e-6
    # Largest distance of the rollout's means from the update's, root mean square over the elements
    # of a sample, in standard deviations of the step; 0: by the precision of the model.
    rollout_tolerance: float = 0.0
    ratio_action: str = "stop"  # stop | log (and apply): what happens above one of them


@dataclasses.dataclass(frozen=True)
class NftConfig:
    """DiffusionNFT: the loss of `loss.objective=nft`, and the policy that samples for it."""

    beta: float = 1.0  # of the implicit policies v_old ± beta·(v - v_old)
    adaptive: bool = True  # every sample and noise level weighs about the same
    # The sampling policy is an average of the trained one that keeps min(rate·(n - start), limit)
    # of itself after n updates: at first the trained policy itself.
    decay_start: int = 0
    decay_rate: float = 0.001
    decay_limit: float = 0.5


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """A moving average of the policy, part of the checkpoints; evaluated on request."""

    decay: float = 0.0  # at most, min(decay, (1 + n)/(10 + n)) after n updates; 0: no average
    every: int = 1  # applied updates from one step of the average to the next


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon behind a global-norm clip."""

    name: str = "adamw"  # adamw | muon (matrices by Muon, vectors by AdamW)
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | linear | cosine, after the warm-up, over num_steps
    final_fraction: float = 0.0  # of the learning rate, at the end of linear and cosine
    momentum: float = 0.95  # of Muon
    newton_schulz_steps: int = 5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning."""

    rank: int = 0  # 0: all weights are trained
    alpha: float = 0.0  # adapters are scaled by alpha / rank; 0: alpha = 2 * rank
    targets: str = ",".join(lora_lib.TARGETS)  # or paths: blocks/image/query
    init: str = ""  # folder or file of adapters that the run starts from; "": fresh ones
    base_dtype: str = "auto"  # of the frozen weights; auto: the compute dtype
    learning_rate: float = 0.0  # 0: that of the optimizer

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

    every: int = 50  # 0: only at the start and at the end
    weights: str = "trained"  # trained | ema: whose videos are scored
    num_prompts: int = 32
    num_test_prompts: int = 0  # of data.test_prompts; 0: all of them
    samples_per_prompt: int = 1  # from 2 on the diversity within a prompt is measured
    num_steps: int = 20
    seed: int = 12345
    manifold_distance: bool = False  # only the moving-shapes world knows its manifold
    shape_identity: bool = False  # how often its captioned shape is seen: of that world too
    sheet_prompts: int = 8  # the first prompts, one clip of each, in contact sheet and animation


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
class DebugConfig:
    """Checks that cost time."""

    shadow: bool = False  # recompute one micro-batch a step in float64 on the CPU


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "sage_grpo"
    method: str = methods.Applied("sage")  # the preset in place, from the recipe's argument
    seed: int = 0
    num_steps: int = 100
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
