"""Architecture of the video VAE of Wan 2.1, and the units of its latents."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from sage_grpo_jax.common import checked_json

CLASS_NAME = "AutoencoderKLWan"
# Far beyond the released model; what is larger comes from a damaged file.
_BOUNDS = {
    "base_dim": 1 << 14,
    "decoder_base_dim": 1 << 14,
    "z_dim": 4096,
    "num_res_blocks": 32,
    "in_channels": 4096,
    "out_channels": 4096,
}
_MAX_WIDTH, _MAX_LEVELS = 1 << 16, 16
# Fields of diffusers' config that have to have these values: Wan 2.2's own VAE is built otherwise.
_FIXED = {"is_residual": False, "patch_size": None}
# Fields that repeat what the levels say, with diffusers' defaults, which are not updated there.
_RATIOS = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}


@dataclasses.dataclass(frozen=True)
class WanVaeConfig:
    """Shape of the VAE. Field names and defaults are those of diffusers, except `dtype`.

    Attributes:
      base_dim: width that `dim_mult` multiplies.
      decoder_base_dim: the same for the decoder; None: as in the encoder.
      z_dim: channels of the latents.
      dim_mult: width of each level over the base width, finest first; between two levels height and
        width are halved.
      num_res_blocks: resnets per encoder level; decoder levels have one more.
      attn_scales: must be empty; the middle block alone has attention. (Of diffusers, too, the
        encoder does not run with any others, and the decoder builds none.)
      temperal_downsample: for each step from a level to the next, whether it also halves time.
      dropout: carried along; `encode` and `decode` drop nothing.
      latents_mean, latents_std: latents of the diffusion model = (mean - latents_mean) /
        latents_std, by channel.
      in_channels, out_channels: channels of the encoded and of the decoded video.
      dtype: compute dtype of convolutions and attention; norms and softmax are float32, parameters
        stay as they are given. "float32" means float32 on every platform, TPUs included.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    in_channels: int = 3
    out_channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _validate(self)

    @property
    def levels(self) -> int:
        return len(self.dim_mult)

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    @property
    def spatial_compression_ratio(self) -> int:
        return 2 ** (self.levels - 1)

    @property
    def temporal_compression_ratio(self) -> int:
        return 2 ** sum(self.temperal_downsample)

    def encoder_width(self, level: int) -> int:
        """Width of encoder level `level` (0 = finest)."""
        return self.base_dim * self.dim_mult[level]

    def encoder_input_width(self, level: int) -> int:
        """Width that enters encoder level `level`."""
        return self.encoder_width(level - 1) if level else self.base_dim

    def decoder_width(self, level: int) -> int:
        """Width of decoder level `level` (0 = coarsest)."""
        base = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        return base * self.dim_mult[::-1][level]

    def decoder_input_width(self, level: int) -> int:
        """Width that enters decoder level `level`: each upsampling halves it, rounding down."""
        return self.decoder_width(level - 1) // 2 if level else self.decoder_width(0)

    def downsamples_time(self, level: int) -> bool:
        """Whether the step from encoder level `level` to the next halves the frames."""
        return self.temperal_downsample[level]

    def upsamples_time(self, level: int) -> bool:
        """Whether the step from decoder level `level` to the next doubles the frames."""
        return self.temperal_downsample[::-1][level]

    @classmethod
    def from_json(cls, text: str, **overrides: Any) -> WanVaeConfig:
        """From the text of a diffusers `config.json`; keys starting with "_" are ignored.

        Raises:
          ValueError: fields that are unknown, or values that they cannot have.
        """
        return cls.from_values(checked_json.parse(text), **overrides)

    @classmethod
    def from_values(cls, values: dict[str, Any], **overrides: Any) -> WanVaeConfig:
        """The same, from the JSON object."""
        given = {name: value for name, value in values.items() if not name.startswith("_")}
        for name, value in _FIXED.items():
            found = given.pop(name, value)
            if found != value or type(found) is not type(value):
                raise ValueError(
                    f"{name}={checked_json.shown(found)}: must be {json.dumps(value)} "
                    "(Wan 2.2's own VAE is not supported)"
                )
        ratios = {name: given.pop(name) for name in _RATIOS if name in given}
        config = cls(**(checked_json.fields(cls, given, ("dtype",)) | overrides))
        _check_ratios(config, ratios)
        return config

    def to_json(self) -> str:
        """The text of a diffusers `config.json`; without `dtype`, which diffusers does not know."""
        values = dataclasses.asdict(self) | _FIXED | _ratios(self)
        del values["dtype"]
        return json.dumps({"_class_name": CLASS_NAME, **values}, indent=2) + "\n"


_LISTS = ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std")


def _ratios(config: WanVaeConfig) -> dict[str, int]:
    return {
        "scale_factor_spatial": config.spatial_compression_ratio,
        "scale_factor_temporal": config.temporal_compression_ratio,
    }


def _check_ratios(config: WanVaeConfig, given: dict[str, Any]) -> None:
    """diffusers writes its default whatever the levels are: only a third value is a mistake."""
    for name, value in given.items():
        value = checked_json.typed(value, int | None, name)
        if value not in (None, _RATIOS[name], _ratios(config)[name]):
            raise ValueError(
                f"{name}={value}: must be {_ratios(config)[name]}, as dim_mult and "
                "temperal_downsample say"
            )


def _validate(config: WanVaeConfig) -> None:
    for name, most in _BOUNDS.items():
        value = getattr(config, name)
        optional = name == "decoder_base_dim" and value is None
        _require(optional or 1 <= value <= most, name, value, f"1 to {most}")
    _validate_levels(config)
    _require(not config.attn_scales, "attn_scales", config.attn_scales,
             "empty: the middle block alone has attention")  # fmt: skip
    _require(0 <= config.dropout < 1, "dropout", config.dropout, "at least 0 and less than 1")
    _require(config.dtype in ("float32", "bfloat16", "float16"), "dtype", config.dtype,
             "float32, bfloat16 or float16")  # fmt: skip
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        _require(len(values) == config.z_dim, name, values, f"z_dim={config.z_dim} numbers")
        _require(all(map(math.isfinite, values)), name, values, "finite")
    _require(min(config.latents_std) > 0, "latents_std", config.latents_std, "positive")


def _validate_levels(config: WanVaeConfig) -> None:
    multiples, temporal = config.dim_mult, config.temperal_downsample
    _require(1 <= len(multiples) <= _MAX_LEVELS, "dim_mult", multiples,
             f"of 1 to {_MAX_LEVELS} levels")  # fmt: skip
    _require(min(multiples) >= 1, "dim_mult", multiples, "each at least 1")
    _require(len(temporal) == len(multiples) - 1, "temperal_downsample", temporal,
             f"one for each of the {len(multiples) - 1} steps between the levels of dim_mult"
             )  # fmt: skip
    _require(all(type(step) is bool for step in temporal), "temperal_downsample", temporal,
             "each true or false")  # fmt: skip
    levels = range(len(multiples))
    widest = max(max(config.encoder_width(i), config.decoder_width(i)) for i in levels)
    _require(widest <= _MAX_WIDTH, "dim_mult", multiples,
             f"such that no level is wider than {_MAX_WIDTH}")  # fmt: skip
    # An upsampling leaves half of the channels.
    narrowest = min((config.decoder_width(i) for i in levels[:-1]), default=2)
    _require(narrowest >= 2, "dim_mult", multiples,
             "such that every decoder level but the last has 2 channels or more")  # fmt: skip


def _require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field}={checked_json.shown(value)}: must be {allowed}")
