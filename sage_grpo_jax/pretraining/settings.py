"""The settings of pretraining as frozen dataclasses, validated once when a run starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import AutoencoderConfig, TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every gradient stage has: an optimizer, its schedule, and an average of the weights.

    The learning rate warms up, then falls to zero with a cosine. With "muon" the kernels learn at
    `muon_scale` times that rate, everything else with Adam. `steps` counts optimizer updates.
    `ema_decay` is the decay of the exponential moving average that is shipped; early in a run a
    faster decay is used, so that the average never remembers the random initialisation.
    """

    steps: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adamw"
    muon_scale: float = 4.0
    warmup_steps: int = 100
    weight_decay: float = 0.0
    beta2: float = 0.99
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    log_every: int = 50
    checkpoint_every: int = 500

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(self.optimizer in ("adamw", "muon"), self, "optimizer", "adamw, muon")
        for name in ("learning_rate", "gradient_clip", "muon_scale"):
            _require(getattr(self, name) > 0, self, name, "a number above 0")
        for name in ("warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, self, name, "0 or more")
        for name in ("ema_decay", "beta2"):
            _require(0 <= getattr(self, name) < 1, self, name, "0 <= value < 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeStageConfig(StageConfig):
    """The autoencoder: weights of the loss, whose terms are means over their own elements.

    `edge_weight` multiplies the L1 distance of the spatial differences between neighbouring
    pixels: it asks for sharp borders where plain L1 accepts a soft one. `contrast_weight` is
    explained at `vae_stages.reconstruction_terms`. The first `short_steps` updates see
    `short_batch_size` clips of `short_frames` frames, which cost less. Latent noise and KL grow
    from zero to their full weight over `noise_warmup_steps`. `latent_noise` adds noise of that
    many standard deviations of the latents, for a decoder that forgives small errors.
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0
    edge_weight: float = 1.0
    contrast_weight: float = 0.0
    kl_weight: float = 1e-4
    short_steps: int = 0
    short_batch_size: int = 8
    short_frames: int = 5
    noise_warmup_steps: int = 0
    latent_noise: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        weights = ("l1_weight", "l2_weight", "edge_weight", "contrast_weight", "kl_weight")
        for name in (*weights, "noise_warmup_steps", "latent_noise"):
            _require(getattr(self, name) >= 0, self, name, "0 or more")
        _require(0 <= self.short_steps <= self.steps, self, "short_steps", "0 to its steps")
        for name in ("short_frames", "short_batch_size"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharpenStageConfig(VaeStageConfig):
    """The decoder on denoised latents: noise levels are uniform from 0 to `max_sigma`."""

    max_sigma: float = 0.5
    denoising_steps: int = 1

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.max_sigma < 1, self, "max_sigma", "0 < value < 1")
        _require(self.denoising_steps >= 1, self, "denoising_steps", "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsStageConfig:
    """How many training clips are encoded once, and how many at a time."""

    num_clips: int
    batch_size: int

    def __post_init__(self):
        _require(self.batch_size >= 1, self, "batch_size", "at least 1")
        allowed = f"a positive multiple of latents.batch_size ({self.batch_size})"
        valid = self.num_clips > 0 and self.num_clips % self.batch_size == 0
        _require(valid, self, "num_clips", allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowStageConfig(StageConfig):
    """Flow matching: sigma = shifted sigmoid of a normal variable, captions dropped at random.

    `first_frame_weight`: how much the first latent frame, which stands for one frame of the video
    alone, counts in the loss beside each of the others.
    """

    shift: float = 3.0
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    caption_drop: float = 0.1
    first_frame_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("shift", "first_frame_weight"):
            _require(getattr(self, name) > 0, self, name, "a number above 0")
        _require(self.sigma_std > 0, self, "sigma_std", "a number above 0")
        _require(0 <= self.caption_drop < 1, self, "caption_drop", "0 <= value < 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillStageConfig(FlowStageConfig):
    """Guidance distillation, away from no caption and from the captions of other shapes.

    `guidance` 1 with `contrast` 0 changes nothing.
    """

    guidance: float = 2.0
    contrast: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _require(self.guidance >= 1, self, "guidance", "at least 1")
        _require(self.contrast >= 0, self, "contrast", "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Samples of validation captions after the last stage, with the ODE sampler."""

    sampling_steps: tuple[int, ...] = (10, 40)
    shift: float = 3.0
    num_samples: int = 64
    sheet_rows: int = 8
    sheet_frames: int = 6

    def __post_init__(self):
        object.__setattr__(self, "sampling_steps", tuple(self.sampling_steps))
        valid = bool(self.sampling_steps) and all(steps >= 1 for steps in self.sampling_steps)
        _require(valid, self, "sampling_steps", "one or more step counts, each at least 1")
        _require(self.shift > 0, self, "shift", "a number above 0")
        for name in ("num_samples", "sheet_rows", "sheet_frames"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(
            self.sheet_rows <= self.num_samples, self, "sheet_rows", "at most report.num_samples"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pretraining run: two models and the stages that make and judge them."""

    seed: int
    vae_model: AutoencoderConfig
    transformer: TransformerConfig
    vae: VaeStageConfig
    polish: VaeStageConfig
    decoder: VaeStageConfig
    latents: LatentsStageConfig
    flow: FlowStageConfig
    distill: DistillStageConfig
    sharpen: SharpenStageConfig
    report: ReportConfig

    def __post_init__(self):
        _require(self.seed >= 0, self, "seed", "0 or more")


_MODELS = {"vae_model": registry.AUTOENCODER, "transformer": registry.TRANSFORMER}
_SECTIONS = {
    "vae": VaeStageConfig,
    "polish": VaeStageConfig,
    "decoder": VaeStageConfig,
    "latents": LatentsStageConfig,
    "flow": FlowStageConfig,
    "distill": DistillStageConfig,
    "sharpen": SharpenStageConfig,
    "report": ReportConfig,
}


def from_mapping(config: Mapping[str, Any]) -> PretrainConfig:
    """Builds and validates a PretrainConfig from nested mappings (a ConfigDict will do).

    A model's section may say by `_class_name`, as in config.json, which model it is; without, it is
    the first of its kind in `models.registry`.

    Raises:
      ValueError: naming the section, the field and what is allowed, for unknown, missing or
        invalid settings.
    """
    # Sections: none missing, none that would be ignored.
    allowed = ["seed", *_MODELS, *_SECTIONS]
    unknown = sorted(set(config) - set(allowed))
    missing = sorted(set(allowed) - set(config))
    if unknown or missing:
        raise ValueError(
            f"pretraining config: unknown sections {unknown}, missing sections {missing}; "
            f"it has exactly {allowed}"
        )

    # Each is checked by its own class.
    sections = {
        name: _build(name, section_type, config[name]) for name, section_type in _SECTIONS.items()
    }
    models = {name: _build_model(name, kind, config[name]) for name, kind in _MODELS.items()}
    return PretrainConfig(seed=config["seed"], **models, **sections)


def _build_model(name: str, kind: str, values: Mapping[str, Any]) -> Any:
    values, allowed = dict(values), registry.names(kind)
    class_name = values.pop("_class_name", allowed[0])
    if class_name not in allowed:
        raise ValueError(f"{name}: _class_name is {class_name!r}; allowed: {', '.join(allowed)}")
    return _build(name, registry.named(class_name).Config, values)


def _build(name: str, section_type: type, values: Mapping[str, Any]) -> Any:
    # Fields: what the class would refuse with a message of Python's own.
    fields = {field.name: field for field in dataclasses.fields(section_type)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{name}: unknown fields {unknown}; allowed are {sorted(fields)}")
    missing = sorted(
        field.name
        for field in fields.values()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in values
    )
    if missing:
        raise ValueError(f"{name}: missing fields {missing}")

    # ConfigDict hands lists back for tuples that were overridden; the model configs are hashable.
    hashable = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return section_type(**hashable)


def _require(condition: bool, config: Any, field: str, allowed: str) -> None:
    if not condition:
        raise ValueError(
            f"{type(config).__name__}.{field} is {getattr(config, field)!r}; allowed: {allowed}"
        )
