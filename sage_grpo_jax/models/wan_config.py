"""Architecture of the Wan 2.1 text-to-video DiT, and how to run it."""

from __future__ import annotations

import dataclasses
from typing import Any

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models import model_config
from sage_grpo_jax.models.model_config import require

CLASS_NAME = "WanTransformer3DModel"
# Tokens that a prompt is filled up to with zeros. The model attends to all of them, so that the
# number is part of the trained model, although no config.json has it.
TEXT_TOKENS = 512
ROPE_THETA = 10_000.0  # fixed in every released model
_IMAGE_FIELDS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
# Far beyond every released model; what is larger comes from a damaged file.
_BOUNDS = {
    "num_attention_heads": 1024,
    "attention_head_dim": 4096,
    "in_channels": 4096,
    "out_channels": 4096,
    "text_dim": 1 << 17,
    "freq_dim": 1 << 17,
    "ffn_dim": 1 << 20,
    "num_layers": 1024,
    "rope_max_seq_len": 1 << 20,
    "hidden_size": 1 << 17,
}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Architecture in diffusers' field names (defaults: the 14 B model), then how to run it.

    Attributes:
      patch_size: along time, height, width.
      freq_dim: width of the sinusoids of the timestep.
      ffn_dim: hidden width of the MLPs.
      cross_attn_norm: a layer norm with scale and bias before cross attention.
      qk_norm: queries and keys are normalised over all heads together.
      image_dim, added_kv_proj_dim, pos_embed_seq_len: parts of the image-to-video models; None.
      rope_max_seq_len: the most tokens along one axis of the grid.
      dtype: compute dtype of matmuls and activations; norms, softmax, modulation are float32.
      attention: "auto" | "splash" | "cudnn" | "xla".
      remat: recompute each block in the backward pass.
      unroll: lay the blocks out one after another instead of scanning over them: faster steps and
        slower compilation, for small models.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    dtype: str = "float32"
    attention: str = "auto"
    remat: bool = True
    unroll: bool = False

    def __post_init__(self) -> None:
        # jit takes configs as static arguments: the list that JSON has would not hash.
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        patch = self.patch_size
        fits = len(patch) == 3 and all(1 <= size <= 64 for size in patch)
        require(fits, "patch_size", patch, "three numbers of 1 to 64")

        # Ahead of the widths: these are other models, and nothing else is wrong with their files.
        for field in _IMAGE_FIELDS:
            value = getattr(self, field)
            require(value is None, field, value, "null: image-to-video models are not supported")

        for field, most in _BOUNDS.items():
            value = getattr(self, field)
            require(1 <= value <= most, field, value, f"1 to {most}")
        require(self.in_channels == self.out_channels, "in_channels", self.in_channels,
                f"out_channels={self.out_channels}: text-to-video has no other input")  # fmt: skip

        for field in ("attention_head_dim", "freq_dim"):
            value = getattr(self, field)
            require(value % 2 == 0, field, value, "even: channels turn in pairs")
        only = WanConfig.qk_norm
        require(self.qk_norm == only, "qk_norm", self.qk_norm, only)
        require(0 < self.eps < 1, "eps", self.eps, "greater than 0, less than 1")
        model_config.check_runtime(self)

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch size along time, height, width."""
        return self.patch_size

    @property
    def rope_axes_dim(self) -> tuple[int, int, int]:
        """Head channels that encode time, height, width: a third each, time takes the rest."""
        third = 2 * (self.attention_head_dim // 6)
        return (self.attention_head_dim - 2 * third, third, third)

    @classmethod
    def from_json(cls, text: str, **runtime: Any) -> WanConfig:
        """From the text of a diffusers config.json; `runtime` sets dtype, attention, remat, unroll.

        Raises:
          ValueError: another model's config, fields that this model does not have, or values that
            it cannot have.
        """
        return cls.from_values(checked_json.parse(text), **runtime)

    @classmethod
    def from_values(cls, values: dict[str, Any], **runtime: Any) -> WanConfig:
        """The same, from the JSON object."""
        return model_config.from_values(cls, CLASS_NAME, values, runtime)

    def to_json(self) -> str:
        """The text of a diffusers config.json; how to run the model is left out."""
        return model_config.to_json(self, CLASS_NAME)


# The released text-to-video models, by the names of the variants.
VARIANTS = {
    "wan_21_t2v_1.3B": WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "wan_21_t2v_14B": WanConfig(),
}
