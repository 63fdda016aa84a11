"""Small random models of diffusers, the same weights in Tencent's layout, and their outputs.

The renaming here is written down on its own, from diffusers to Tencent (the key tables go from our
names to both), as a list of patterns.
"""

import functools
import json
import re

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel

from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.models.hunyuan_video import Condition, HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig

FILE = "diffusion_pytorch_model.safetensors"
DIT = HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_refiner_layers=2,
    text_embed_dim=8,
    text_embed_2_dim=1472,
    image_embed_dim=5,
    rope_axes_dim=(4, 6, 6),
    use_meanflow=True,
    remat=False,
)
# What Tencent's repository would have as config.json of this model.
DIT_JSON = {
    "_class_name": "HunyuanVideo_1_5_DiffusionTransformer",
    "_diffusers_version": "0.35.0",
    "attn_mode": "flash",
    "attn_param": None,
    "concat_condition": True,
    "glyph_byT5_v2": True,
    "guidance_embed": False,
    "heads_num": 2,
    "hidden_size": 32,
    "ideal_resolution": "480p",
    "ideal_task": "t2v",
    "in_channels": 4,
    "is_reshape_temporal_channels": False,
    "mlp_act_type": "gelu_tanh",
    "mlp_width_ratio": 4,
    "mm_double_blocks_depth": 3,
    "mm_single_blocks_depth": 0,
    "out_channels": 4,
    "patch_size": [1, 1, 1],
    "qk_norm": True,
    "qk_norm_type": "rms",
    "qkv_bias": True,
    "rope_dim_list": [4, 6, 6],
    "rope_theta": 256,
    "text_pool_type": None,
    "text_projection": "single_refiner",
    "text_states_dim": 8,
    "text_states_dim_2": None,
    "use_attention_mask": True,
    "use_cond_type_embedding": True,
    "use_meanflow": True,
    "vision_projection": "linear",
    "vision_states_dim": 5,
}
VAE = VaeConfig(
    latent_channels=4,
    block_out_channels=(8, 16, 32),
    layers_per_block=1,
    spatial_compression_ratio=4,
    scaling_factor=0.7,
)
VAE_JSON = {
    "_class_name": "AutoencoderKLConv3D",
    "block_out_channels": [8, 16, 32],
    "downsample_match_channel": True,
    "ffactor_spatial": 4,
    "ffactor_temporal": 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "out_channels": 3,
    "sample_size": 256,
    "sample_tsize": 64,
    "scaling_factor": 0.7,
    "shift_factor": None,
    "upsample_match_channel": True,
}
_DIT_NAMES = [
    (r"x_embedder\.", "img_in."),
    (r"time_embed\.timestep_embedder(_r)?\.linear_1", r"time\1_in.mlp.0"),
    (r"time_embed\.timestep_embedder(_r)?\.linear_2", r"time\1_in.mlp.2"),
    (r"cond_type_embed\.", "cond_type_embedding."),
    (r"context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    (r"context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    (r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.norm_out\.linear",
     r"txt_in.individual_token_refiner.blocks.\1.adaLN_modulation.1"),
    (r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0",
     r"txt_in.individual_token_refiner.blocks.\1.self_attn_proj"),
    (r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.0\.proj",
     r"txt_in.individual_token_refiner.blocks.\1.mlp.fc1"),
    (r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.ff\.net\.2",
     r"txt_in.individual_token_refiner.blocks.\1.mlp.fc2"),
    (r"context_embedder\.token_refiner\.refiner_blocks\.",
     "txt_in.individual_token_refiner.blocks."),
    (r"context_embedder_2\.norm", "byt5_in.layernorm"),
    (r"context_embedder_2\.linear_", "byt5_in.fc"),
    (r"image_embedder\.norm_in", "vision_in.proj.0"),
    (r"image_embedder\.linear_1", "vision_in.proj.1"),
    (r"image_embedder\.linear_2", "vision_in.proj.3"),
    (r"image_embedder\.norm_out", "vision_in.proj.4"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.linear"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.linear"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"double_blocks.\1.img_attn_\2"),
    (r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj", r"double_blocks.\1.txt_attn_\2"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])", r"double_blocks.\1.txt_attn_\2_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_([qk])", r"double_blocks.\1.img_attn_\2_norm"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"proj_out", "final_layer.linear"),
]  # fmt: skip
_VAE_NAMES = [
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.up.\1.block.\2."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"(en|de)coder\.mid_block\.resnets\.0\.", r"\1coder.mid.block_1."),
    (r"(en|de)coder\.mid_block\.resnets\.1\.", r"\1coder.mid.block_2."),
    (r"(en|de)coder\.mid_block\.attentions\.0\.to_", r"\1coder.mid.attn_1."),
    (r"(en|de)coder\.mid_block\.attentions\.0\.", r"\1coder.mid.attn_1."),
]


def _rename(name: str, patterns: list[tuple[str, str]]) -> str:
    for pattern, new in patterns:
        renamed, count = re.subn(f"^{pattern}", new, name)
        if count:
            return renamed.replace("conv_shortcut", "nin_shortcut")
    return name


def dit_to_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A DiT of diffusers in Tencent's layout."""
    official = {}
    state = dict(state)
    for name in list(state):
        if "refiner_blocks" in name and ".attn.to_q." in name:
            parts = [state.pop(name.replace("to_q", f"to_{x}")) for x in "qkv"]
            block = re.search(r"refiner_blocks\.(\d+)", name)[1]
            fused = f"txt_in.individual_token_refiner.blocks.{block}.self_attn_qkv"
            official[f"{fused}.{name.rsplit('.', 1)[1]}"] = torch.cat(parts, dim=0)
    for name, tensor in state.items():
        if name.startswith("norm_out.linear"):
            scale, shift = tensor.chunk(2, dim=0)
            tensor = torch.cat([shift, scale], dim=0)
        new = _rename(name, _DIT_NAMES)
        assert new != name, name
        official[new] = tensor.contiguous()
    return official


def vae_to_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE of diffusers in Tencent's layout."""
    return {_rename(name, _VAE_NAMES): tensor.contiguous() for name, tensor in state.items()}


@functools.cache
def dit_oracle() -> HunyuanVideo15Transformer3DModel:
    """diffusers' DiT of `DIT`, every parameter random."""
    torch.manual_seed(0)
    return _randomise(HunyuanVideo15Transformer3DModel.from_config(json.loads(DIT.to_json())))


@functools.cache
def vae_oracle() -> AutoencoderKLHunyuanVideo15:
    """diffusers' VAE of `VAE`, every parameter random."""
    torch.manual_seed(1)
    return _randomise(AutoencoderKLHunyuanVideo15.from_config(json.loads(VAE.to_json())))


def _randomise(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
            if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                parameter.normal_(mean=1.0, std=0.2)
    return model.eval()


def _dit_inputs() -> tuple[np.ndarray, np.ndarray, Condition]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((1, *shape), np.float32)

    condition = Condition(
        text=normal(5, 8),
        text_mask=np.arange(5)[None] < 4,
        byt5=normal(3, 1472),
        byt5_mask=np.arange(3)[None] < 2,
        image=normal(2, 5),
        latents=normal(2, 3, 2, 5),
        timestep_r=np.array([312.5], np.float32),
    )
    return normal(2, 3, 2, 4), np.array([993.71], np.float32), condition


def dit_oracle_output(model: torch.nn.Module) -> np.ndarray:
    """What diffusers computes on fixed inputs, channels last."""
    latents, timestep, condition = _dit_inputs()
    both = np.concatenate([latents, condition.latents], axis=-1).transpose(0, 4, 1, 2, 3)
    with torch.no_grad():
        out = model(
            hidden_states=torch.tensor(both),
            timestep=torch.tensor(timestep),
            encoder_hidden_states=torch.tensor(condition.text),
            encoder_attention_mask=torch.tensor(condition.text_mask).long(),
            timestep_r=torch.tensor(condition.timestep_r),
            encoder_hidden_states_2=torch.tensor(condition.byt5),
            encoder_attention_mask_2=torch.tensor(condition.byt5_mask).long(),
            image_embeds=torch.tensor(condition.image),
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 4, 1).numpy()


@functools.cache
def _jit(function):
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, static_argnames="config", compiler_options=options)


def dit_output(params) -> np.ndarray:
    """What our model computes on the same inputs."""
    return np.asarray(_jit(hunyuan_video.velocity)(params, *_dit_inputs(), config=DIT))


def vae_oracle_output(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """(mean of the latents of a fixed clip, decoded fixed latents) of diffusers."""
    clip, latents = _vae_inputs()
    with torch.no_grad():
        mean = model.encode(torch.tensor(clip.transpose(0, 4, 1, 2, 3))).latent_dist.mean
        decoded = model.decode(torch.tensor(latents.transpose(0, 4, 1, 2, 3))).sample
    return tuple(x.permute(0, 2, 3, 4, 1).numpy() for x in (mean, decoded))


def vae_output(params) -> tuple[np.ndarray, np.ndarray]:
    """The same of our VAE."""
    clip, latents = _vae_inputs()
    mean = _jit(vae.encode)(params, clip, config=VAE)
    return np.asarray(mean[0]), np.asarray(_jit(vae.decode)(params, latents, config=VAE))


def _vae_inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    clip = rng.standard_normal((1, 5, 8, 4, 3), np.float32)
    return clip, rng.standard_normal((1, 2, 1, 2, 4), np.float32)
