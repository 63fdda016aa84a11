"""config.json of HunyuanVideo-1.5 as Tencent writes it.

Sources of the fields: the constructors in
`hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py` and
`hyvideo/models/autoencoders/hunyuanvideo_15_vae.py`.
"""

from __future__ import annotations

import typing
from typing import Any

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.models.hunyuan_video_config import TASKS, HunyuanVideoConfig
from sage_grpo_jax.models.model_config import require
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights.tables.model_tables import ConfigJson, refuse_unknown

_BYT5_WIDTH = 1472  # the only one that Tencent's model builds
_REFINER_LAYERS = 2  # likewise
_RESOLUTIONS = {"480p": 640, "720p": 960}
# Fields of Tencent's DiT that have to have these values: other models are built otherwise.
_DIT_FIXED = {
    "mm_single_blocks_depth": 0,
    "qkv_bias": True,
    "qk_norm": True,
    "qk_norm_type": "rms",
    "mlp_act_type": "gelu_tanh",
    "guidance_embed": False,
    "text_projection": "single_refiner",
    "text_pool_type": None,
    "is_reshape_temporal_channels": False,
    "use_cond_type_embedding": True,
}
# Fields without influence on the weights or on the dense computation.
_DIT_FREE = {
    "attn_mode": "flash",
    "attn_param": None,
    "text_states_dim_2": None,
    "use_attention_mask": True,
}
# Fields that are read, with their types; None: may be absent or null.
_DIT_READ = {
    "patch_size": int | tuple[int, int, int],
    "in_channels": int,
    "concat_condition": bool | None,
    "out_channels": int | None,
    "hidden_size": int,
    "heads_num": int,
    "mlp_width_ratio": float | None,
    "mm_double_blocks_depth": int,
    "rope_dim_list": tuple[int, int, int],
    "rope_theta": float | None,
    "use_meanflow": bool | None,
    "text_states_dim": int,
    "glyph_byT5_v2": bool | None,
    "vision_projection": str | None,
    "vision_states_dim": int | None,
    "ideal_resolution": str | None,
    "ideal_task": str | None,
}
_VAE_SAME = ("in_channels", "out_channels", "latent_channels", "block_out_channels",
             "layers_per_block", "downsample_match_channel", "upsample_match_channel",
             "scaling_factor")  # fmt: skip
_VAE_RENAMED = {
    "ffactor_spatial": "spatial_compression_ratio",
    "ffactor_temporal": "temporal_compression_ratio",
}
# Sizes of tiles; the pipelines choose them again.
_VAE_FREE = {"sample_size": 256, "sample_tsize": 64}


def _transformer_from_values(values: dict[str, Any]) -> HunyuanVideoConfig:
    for field, value in _DIT_FIXED.items():
        require(values.get(field, value) == value, field, values.get(field), repr(value))
    refuse_unknown(values, (*_DIT_FIXED, *_DIT_FREE, *_DIT_READ))
    given = {field: _read(values, field, hint) for field, hint in _DIT_READ.items()}

    # What goes together
    hidden, heads = given["hidden_size"], given["heads_num"]
    require(heads >= 1, "heads_num", heads, "at least 1")
    require(hidden % heads == 0, "hidden_size", hidden, f"a multiple of heads_num={heads}")
    patch = given["patch_size"]
    patch = [patch] * 3 if isinstance(patch, int) else patch
    require(patch[1] == patch[2], "patch_size", patch, "[t, s, s]")
    resolution, task = given["ideal_resolution"] or "480p", given["ideal_task"] or "t2v"
    require(resolution in _RESOLUTIONS, "ideal_resolution", resolution, f"one of {[*_RESOLUTIONS]}")
    require(task in TASKS, "ideal_task", task, f"one of {TASKS}")
    vision = given["vision_projection"]
    require(vision in ("linear", "none", None), "vision_projection", vision, "'linear' or 'none'")
    if vision == "linear":
        checked_json.member(values, "vision_states_dim", int)

    # Ours
    channels, out_channels = given["in_channels"], given["out_channels"]
    ratio, theta = given["mlp_width_ratio"], given["rope_theta"]
    return HunyuanVideoConfig(
        in_channels=channels if given["concat_condition"] is False else 2 * channels + 1,
        out_channels=channels if out_channels is None else out_channels,
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        num_layers=given["mm_double_blocks_depth"],
        num_refiner_layers=_REFINER_LAYERS,
        mlp_ratio=4.0 if ratio is None else float(ratio),
        patch_size=patch[1],
        patch_size_t=patch[0],
        text_embed_dim=given["text_states_dim"],
        text_embed_2_dim=_BYT5_WIDTH if given["glyph_byT5_v2"] else None,
        image_embed_dim=given["vision_states_dim"] if vision == "linear" else None,
        rope_theta=256.0 if theta is None else float(theta),
        rope_axes_dim=tuple(given["rope_dim_list"]),
        target_size=_RESOLUTIONS[resolution],
        task_type=task,
        use_meanflow=bool(given["use_meanflow"]),
    )


def _read(values: dict[str, Any], field: str, hint: Any) -> Any:
    """The value of a field; None where it is absent and its type allows that."""
    if field not in values and type(None) in typing.get_args(hint):
        return None
    return checked_json.member(values, field, hint)


def _transformer_to_values(config: HunyuanVideoConfig) -> dict[str, Any]:
    concatenated = config.in_channels != config.out_channels
    require(
        not concatenated or config.in_channels == 2 * config.out_channels + 1,
        "in_channels",
        config.in_channels,
        f"{config.out_channels} or {2 * config.out_channels + 1} in Tencent's layout",
    )

    for field, allowed in (
        ("text_embed_2_dim", (_BYT5_WIDTH, None)),
        ("num_refiner_layers", (_REFINER_LAYERS,)),
        ("target_size", tuple(_RESOLUTIONS.values())),
    ):
        value = getattr(config, field)
        require(value in allowed, field, value, f"one of {list(allowed)} in Tencent's layout")

    whole = config.mlp_ratio == int(config.mlp_ratio)
    return {
        **_DIT_FIXED,
        **_DIT_FREE,
        "patch_size": list(config.patch),
        "in_channels": config.out_channels,
        "concat_condition": concatenated,
        "out_channels": config.out_channels,
        "hidden_size": config.hidden_size,
        "heads_num": config.num_attention_heads,
        "mlp_width_ratio": int(config.mlp_ratio) if whole else config.mlp_ratio,
        "mm_double_blocks_depth": config.num_layers,
        "rope_dim_list": list(config.rope_axes_dim),
        "rope_theta": config.rope_theta,
        "use_meanflow": config.use_meanflow,
        "text_states_dim": config.text_embed_dim,
        "glyph_byT5_v2": config.text_embed_2_dim is not None,
        "vision_projection": "none" if config.image_embed_dim is None else "linear",
        "vision_states_dim": config.image_embed_dim or 1152,
        "ideal_resolution": {size: name for name, size in _RESOLUTIONS.items()}[config.target_size],
        "ideal_task": config.task_type,
    }


def _vae_from_values(values: dict[str, Any]) -> VaeConfig:
    shift = values.get("shift_factor")
    require(not shift, "shift_factor", shift, "None or 0")
    refuse_unknown(values, (*_VAE_SAME, *_VAE_RENAMED, *_VAE_FREE, "shift_factor"))
    hints = typing.get_type_hints(VaeConfig)
    given = {f: checked_json.typed(values[f], hints[f], f) for f in _VAE_SAME if f in values}
    for theirs, ours in _VAE_RENAMED.items():
        given[ours] = checked_json.member(values, theirs, hints[ours])
    return VaeConfig(**given)


def _vae_to_values(config: VaeConfig) -> dict[str, Any]:
    return {
        **{field: getattr(config, field) for field in _VAE_SAME},
        **{theirs: getattr(config, ours) for theirs, ours in _VAE_RENAMED.items()},
        **_VAE_FREE,
        "shift_factor": None,
    }


TRANSFORMER = ConfigJson(
    "HunyuanVideo_1_5_DiffusionTransformer", _transformer_from_values, _transformer_to_values
)
VAE = ConfigJson("AutoencoderKLConv3D", _vae_from_values, _vae_to_values)
