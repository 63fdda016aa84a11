"""Small random Wan transformers of diffusers, their weights as our parameters, and inputs."""

import dataclasses

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from flax import traverse_util

from sage_grpo_jax.models.model_config import RUNTIME_FIELDS
from sage_grpo_jax.models.wan import Condition, WanConfig
from sage_grpo_jax.weights.tables import wan_keys

TINY = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    freq_dim=16,
    ffn_dim=40,
    num_layers=2,
    remat=False,
)


def make_oracle(config: WanConfig, seed: int = 0) -> WanTransformer3DModel:
    """diffusers' model with every parameter random."""
    fields = dataclasses.asdict(config)
    for name in RUNTIME_FIELDS:
        del fields[name]
    model = WanTransformer3DModel(**fields)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            table = name.endswith("scale_shift_table")
            fan_in = parameter[0].numel() if parameter.ndim > 1 and not table else 50.0
            parameter.normal_(std=fan_in**-0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def ours_from_theirs(config: WanConfig, tensors: dict[str, np.ndarray]) -> dict:
    """Our tree, row by row of the key table."""
    flat = {}
    for row in wan_keys.diffusers_rows(config):
        layers = [row.layout.to_ours(tensors[name]) for name in row.names()]
        flat[row.ours] = layers[0] if row.stacked is None else np.stack(layers)
    return traverse_util.unflatten_dict(flat)


def parameters(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def make_inputs(
    config: WanConfig, grid: tuple[int, int, int], lengths: tuple[int, ...], tokens: int = 7
) -> tuple[np.ndarray, np.ndarray, Condition]:
    """Latents, timesteps and a text of `tokens`, of which each sample has a length of its own."""
    rng, batch = np.random.default_rng(0), len(lengths)
    latents = rng.standard_normal((batch, *grid, config.in_channels), np.float32)
    text = rng.standard_normal((batch, tokens, config.text_dim), np.float32)
    mask = np.arange(tokens) < np.array(lengths)[:, None]
    return latents, np.linspace(993.71, 41.3, batch, dtype=np.float32), Condition(text, mask)


def oracle_inputs(latents, timestep, condition: Condition) -> dict[str, torch.Tensor]:
    """As diffusers' pipeline hands them over: text filled up with zeros, and no mask."""
    text = np.where(condition.text_mask[:, :, None], condition.text, 0.0)
    return {
        "hidden_states": torch.tensor(latents.transpose(0, 4, 1, 2, 3), requires_grad=True),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": torch.tensor(text),
    }


def oracle_output(model, *inputs) -> np.ndarray:
    """[B, T, H, W, C]."""
    with torch.no_grad():
        out = model(**oracle_inputs(*inputs), return_dict=False)[0]
    return out.permute(0, 2, 3, 4, 1).numpy()
