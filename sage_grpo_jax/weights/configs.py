"""config.json files of the models: diffusers' (which are also ours) and Tencent's.

Sources of Tencent's fields: the constructors in
`hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py` and
`hyvideo/models/autoencoders/hunyuanvideo_15_vae.py`.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from sage_grpo_jax.models import hunyuan_video_config
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.hunyuan_video_config import require
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights.tables import Config

CONFIG_FILE = "config.json"
_DIFFUSERS = {
    hunyuan_video_config.CLASS_NAME: HunyuanVideoConfig,
    "AutoencoderKLHunyuanVideo15": VaeConfig,
}
_TENCENT_DIT = "HunyuanVideo_1_5_DiffusionTransformer"
_TENCENT_VAE = "AutoencoderKLConv3D"
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
_DIT_READ = (
    "patch_size", "in_channels", "concat_condition", "out_channels", "hidden_size", "heads_num",
    "mlp_width_ratio", "mm_double_blocks_depth", "rope_dim_list", "rope_theta", "use_meanflow",
    "text_states_dim", "glyph_byT5_v2", "vision_projection", "vision_states_dim",
    "ideal_resolution", "ideal_task",
)  # fmt: skip
_VAE_SAME = ("in_channels", "out_channels", "latent_channels", "block_out_channels",
             "layers_per_block", "downsample_match_channel", "upsample_match_channel",
             "scaling_factor")  # fmt: skip
_VAE_RENAMED = {
    "ffactor_spatial": "spatial_compression_ratio",
    "ffactor_temporal": "temporal_compression_ratio",
}
# Sizes of tiles; the pipelines choose them again.
_VAE_FREE = {"sample_size": 256, "sample_tsize": 64}


def load_config(path: str | os.PathLike) -> Config:
    """The config of a model folder, of the folder of a weights file, or of a config file.

    Raises:
      ValueError: no readable config.json, or a model that is not ours.
    """
    path = pathlib.Path(path)
    file = path
    if path.suffix != ".json" or path.name.endswith(".index.json"):
        file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"path={path}: no {file}")
    text = file.read_text()
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    name = values.get("_class_name") if isinstance(values, dict) else None
    try:
        if name in _DIFFUSERS:
            return _DIFFUSERS[name].from_json(text)
        if name == _TENCENT_DIT:
            return _dit_from_tencent(values)
        if name == _TENCENT_VAE:
            return _vae_from_tencent(values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: {_reason(error)}") from error
    allowed = [*_DIFFUSERS, _TENCENT_DIT, _TENCENT_VAE]
    raise ValueError(f"{file}: _class_name={name!r}: must be one of {allowed}")


def to_json(config: Config, layout: str) -> str:
    """The text of config.json in a layout ("diffusers" or "tencent").

    Raises:
      ValueError: Tencent's config cannot express this model.
    """
    if layout == "diffusers":
        return config.to_json()
    to_tencent = _dit_to_tencent if isinstance(config, HunyuanVideoConfig) else _vae_to_tencent
    return json.dumps(to_tencent(config), indent=2, sort_keys=True) + "\n"


def _reason(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


def _dit_from_tencent(values: dict[str, Any]) -> HunyuanVideoConfig:
    for field, value in _DIT_FIXED.items():
        require(values.get(field, value) == value, field, values.get(field), repr(value))
    _refuse_unknown(values, (*_DIT_FIXED, *_DIT_FREE, *_DIT_READ))
    hidden, heads = values["hidden_size"], values["heads_num"]
    require(hidden % heads == 0, "hidden_size", hidden, f"a multiple of heads_num={heads}")
    patch = values["patch_size"]
    patch = [patch] * 3 if isinstance(patch, int) else patch
    require(len(patch) == 3 and patch[1] == patch[2], "patch_size", patch, "[t, s, s]")
    resolution = values.get("ideal_resolution") or "480p"
    require(resolution in _RESOLUTIONS, "ideal_resolution", resolution, f"one of {[*_RESOLUTIONS]}")
    channels = values["in_channels"]
    out_channels = values.get("out_channels")
    vision = values.get("vision_projection", "none")
    require(vision in ("linear", "none", None), "vision_projection", vision, "'linear' or 'none'")
    return HunyuanVideoConfig(
        in_channels=2 * channels + 1 if values.get("concat_condition", True) else channels,
        out_channels=channels if out_channels is None else out_channels,
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        num_layers=values["mm_double_blocks_depth"],
        num_refiner_layers=_REFINER_LAYERS,
        mlp_ratio=float(values.get("mlp_width_ratio", 4.0)),
        patch_size=patch[1],
        patch_size_t=patch[0],
        text_embed_dim=values["text_states_dim"],
        text_embed_2_dim=_BYT5_WIDTH if values.get("glyph_byT5_v2") else None,
        image_embed_dim=values["vision_states_dim"] if vision == "linear" else None,
        rope_theta=float(values.get("rope_theta", 256)),
        rope_axes_dim=tuple(values["rope_dim_list"]),
        target_size=_RESOLUTIONS[resolution],
        task_type=values.get("ideal_task") or "t2v",
        use_meanflow=bool(values.get("use_meanflow", False)),
    )


def _dit_to_tencent(config: HunyuanVideoConfig) -> dict[str, Any]:
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
        "_class_name": _TENCENT_DIT,
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


def _vae_from_tencent(values: dict[str, Any]) -> VaeConfig:
    shift = values.get("shift_factor")
    require(not shift, "shift_factor", shift, "None or 0")
    _refuse_unknown(values, (*_VAE_SAME, *_VAE_RENAMED, *_VAE_FREE, "shift_factor"))
    given = {field: values[field] for field in _VAE_SAME if field in values}
    given |= {ours: values[theirs] for theirs, ours in _VAE_RENAMED.items()}
    return VaeConfig(**given)


def _vae_to_tencent(config: VaeConfig) -> dict[str, Any]:
    return {
        "_class_name": _TENCENT_VAE,
        **{field: getattr(config, field) for field in _VAE_SAME},
        **{theirs: getattr(config, ours) for theirs, ours in _VAE_RENAMED.items()},
        **_VAE_FREE,
        "shift_factor": None,
    }


def _refuse_unknown(values: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    require(not unknown, "fields", unknown, f"only {sorted(known)}")
