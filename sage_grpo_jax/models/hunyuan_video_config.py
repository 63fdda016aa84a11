"""Architecture of the HunyuanVideo-1.5 DiT, and how to run it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models import model_config
from sage_grpo_jax.models.model_config import require

CLASS_NAME = "HunyuanVideo15Transformer3DModel"
TASKS = ("t2v", "i2v")
# Names of the released checkpoints.
VARIANTS = tuple(
    f"{size}_{task}{kind}"
    for size in ("480p", "720p")
    for task in TASKS
    for kind in ("", "_distilled", "_step_distilled")
)
# Far beyond every released model; what is larger comes from a damaged file.
_BOUNDS = {
    "in_channels": 4096,
    "out_channels": 4096,
    "num_attention_heads": 1024,
    "attention_head_dim": 4096,
    "num_layers": 1024,
    "num_refiner_layers": 1024,
    "patch_size": 64,
    "patch_size_t": 64,
    "text_embed_dim": 1 << 17,
    "text_embed_2_dim": 1 << 17,
    "image_embed_dim": 1 << 17,
    "hidden_size": 1 << 17,
    "target_size": 1 << 17,
}


@dataclasses.dataclass(frozen=True)
class HunyuanVideoConfig:
    """Architecture in diffusers' field names (defaults: the full model), then how to run it.

    Attributes:
      text_embed_2_dim: width of ByT5 embeddings; None builds no ByT5 mapper.
      image_embed_dim: width of vision embeddings; None builds no vision projection.
      rope_axes_dim: head channels that encode time, height, width.
      target_size, task_type: carried along for pipelines; no influence on the model.
      use_meanflow: builds the second time embedding.
      dtype: compute dtype of matmuls and activations; norms, softmax, modulation are float32.
      attention: "auto" | "splash" | "cudnn" | "xla".
      remat: recompute each block in the backward pass.
      unroll: lay the blocks out one after another instead of scanning over them: faster steps and
        slower compilation, for small models.
    """

    in_channels: int = 65
    out_channels: int = 32
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    num_layers: int = 54
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 1
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    text_embed_dim: int = 3584
    text_embed_2_dim: int | None = 1472
    image_embed_dim: int | None = 1152
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    target_size: int = 640
    task_type: str = "t2v"
    use_meanflow: bool = False
    dtype: str = "float32"
    attention: str = "auto"
    remat: bool = True
    unroll: bool = False

    def __post_init__(self) -> None:
        # jit takes configs as static arguments: the list that JSON has would not hash.
        object.__setattr__(self, "rope_axes_dim", tuple(self.rope_axes_dim))

        for field, most in _BOUNDS.items():
            value = getattr(self, field)
            require(value is None or 1 <= value <= most, field, value, f"1 to {most}")
        # The channels beyond those of the latents are the condition's.
        require(self.in_channels >= self.out_channels, "in_channels", self.in_channels,
                 f"at least out_channels={self.out_channels}")  # fmt: skip

        # Each axis turns pairs of channels of its own.
        axes = self.rope_axes_dim
        require(
            len(axes) == 3
            and all(dim % 2 == 0 and dim >= 0 for dim in axes)
            and sum(axes) == self.attention_head_dim,
            "rope_axes_dim",
            axes,
            f"three even numbers that sum to attention_head_dim={self.attention_head_dim}",
        )
        require(0 < self.rope_theta < math.inf, "rope_theta", self.rope_theta, "positive, finite")

        width = self.hidden_size * self.mlp_ratio
        require(1 <= width <= 1 << 20, "mlp_ratio", self.mlp_ratio,
                 f"such that {self.hidden_size} times it is 1 to {1 << 20}")  # fmt: skip
        require(self.task_type in TASKS, "task_type", self.task_type, f"one of {TASKS}")
        require(self.qk_norm == "rms_norm", "qk_norm", self.qk_norm, "'rms_norm'")
        model_config.check_runtime(self)

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch size along time, height, width."""
        return (self.patch_size_t, self.patch_size, self.patch_size)

    @classmethod
    def from_json(cls, text: str, **runtime: Any) -> HunyuanVideoConfig:
        """From the text of a diffusers config.json; `runtime` sets dtype, attention, remat, unroll.

        Raises:
          ValueError: another model's config, fields that this model does not have, or values that
            it cannot have.
        """
        return cls.from_values(checked_json.parse(text), **runtime)

    @classmethod
    def from_values(cls, values: dict[str, Any], **runtime: Any) -> HunyuanVideoConfig:
        """The same, from the JSON object."""
        return model_config.from_values(cls, CLASS_NAME, values, runtime)

    def to_json(self) -> str:
        """The text of a diffusers config.json; how to run the model is left out."""
        return model_config.to_json(self, CLASS_NAME)


def released(variant: str) -> HunyuanVideoConfig:
    """The config of one of `VARIANTS`."""
    return HunyuanVideoConfig(
        target_size=960 if variant.startswith("720p") else 640,
        task_type="i2v" if "i2v" in variant else "t2v",
        use_meanflow=variant.endswith("step_distilled"),
    )
