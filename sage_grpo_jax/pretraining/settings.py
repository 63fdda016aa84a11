"""The settings of pretraining as frozen dataclasses, validated once when a run starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sage_grpo_jax.common import checked_json, fields
from sage_grpo_jax.common.fields import bounded, choice
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

    steps: int = bounded(least=1)
    batch_size: int = bounded(least=1)
    learning_rate: float = bounded(above=0)
    optimizer: str = choice("adamw", ("adamw", "muon"))
    muon_scale: float = bounded(4.0, above=0)
    warmup_steps: int = bounded(100, least=0)
    weight_decay: float = bounded(0.0, least=0)
    beta2: float = bounded(0.99, least=0, below=1)
    gradient_clip: float = bounded(1.0, above=0)
    ema_decay: float = bounded(0.999, least=0, below=1)
    log_every: int = bounded(50, least=1)
    checkpoint_every: int = bounded(500, least=1)

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is out of range."""
        fields.check(self)


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

    l1_weight: float = bounded(1.0, least=0)
    l2_weight: float = bounded(0.0, least=0)
    edge_weight: float = bounded(1.0, least=0)
    contrast_weight: float = bounded(0.0, least=0)
    kl_weight: float = bounded(1e-4, least=0)
    short_steps: int = bounded(0, least=0)
    short_batch_size: int = bounded(8, least=1)
    short_frames: int = bounded(5, least=1)
    noise_warmup_steps: int = bounded(0, least=0)
    latent_noise: float = bounded(0.0, least=0)

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is out of range."""
        super().__post_init__()
        fits = self.short_steps <= self.steps
        fields.require(fits, self, "short_steps", f"0 to its steps, {self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharpenStageConfig(VaeStageConfig):
    """The decoder on denoised latents: noise levels are uniform from 0 to `max_sigma`."""

    max_sigma: float = bounded(0.5, above=0, below=1)
    denoising_steps: int = bounded(1, least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsStageConfig:
    """How many training clips are encoded once, and how many at a time."""

    num_clips: int = bounded(least=1)
    batch_size: int = bounded(least=1)

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is out of range."""
        fields.check(self)
        whole = self.num_clips % self.batch_size == 0
        allowed = f"a positive multiple of latents.batch_size ({self.batch_size})"
        fields.require(whole, self, "num_clips", allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowStageConfig(StageConfig):
    """Flow matching: sigma = shifted sigmoid of a normal variable, captions dropped at random.

    `first_frame_weight`: how much the first latent frame, which stands for one frame of the video
    alone, counts in the loss beside each of the others.
    """

    shift: float = bounded(3.0, above=0)
    sigma_mean: float = bounded(0.0)
    sigma_std: float = bounded(1.0, above=0)
    caption_drop: float = bounded(0.1, least=0, below=1)
    first_frame_weight: float = bounded(1.0, above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillStageConfig(FlowStageConfig):
    """Guidance distillation, away from no caption and from the captions of other shapes.

    `guidance` 1 with `contrast` 0 changes nothing.
    """

    guidance: float = bounded(2.0, least=1)
    contrast: float = bounded(1.0, least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Samples of validation captions after the last stage, with the ODE sampler."""

    sampling_steps: tuple[int, ...] = bounded((10, 40), least=1)
    shift: float = bounded(3.0, above=0)
    num_samples: int = bounded(64, least=1)
    sheet_rows: int = bounded(8, least=1)
    sheet_frames: int = bounded(6, least=1)

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is out of range."""
        fields.check(self)
        fits = self.sheet_rows <= self.num_samples
        fields.require(fits, self, "sheet_rows", f"at most report.num_samples={self.num_samples}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pretraining run: two models and the stages that make and judge them."""

    seed: int = bounded(least=0)
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

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is out of range."""
        fields.check(self)


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
        name: fields.build(section_type, config[name], name, defaults=True)
        for name, section_type in _SECTIONS.items()
    }
    models = {name: _build_model(name, kind, config[name]) for name, kind in _MODELS.items()}
    return PretrainConfig(seed=config["seed"], **models, **sections)


def _build_model(name: str, kind: str, values: Mapping[str, Any]) -> Any:
    """The config of a model, which checks itself; here only that its fields are fields."""
    values, allowed = dict(values), registry.names(kind)
    class_name = values.pop("_class_name", allowed[0])
    if class_name not in allowed:
        raise ValueError(f"{name}: _class_name is {class_name!r}; allowed: {', '.join(allowed)}")
    model_type = registry.named(class_name).Config
    # A ConfigDict hands lists back for tuples that were overridden.
    listed = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    try:
        checked_json.fields(model_type, listed)
        return model_type(**tuples)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
