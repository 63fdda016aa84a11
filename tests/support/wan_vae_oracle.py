"""diffusers' AutoencoderKLWan as the truth: small random models, and their tensors as our tree."""

import functools
import json

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from flax import traverse_util

from sage_grpo_jax.models import wan_vae
from sage_grpo_jax.models.wan_vae import WanVaeConfig
from sage_grpo_jax.weights.formats.source import Path, Shape
from sage_grpo_jax.weights.tables import key_table, wan_vae_keys


def reference(config: WanVaeConfig, seed: int = 0) -> AutoencoderKLWan:
    """A random model; norms and biases, which diffusers makes constant, are random, too.

    The last convolution is scaled up, so that some pixels are clipped.
    """
    torch.manual_seed(seed)
    fields = json.loads(config.to_json())
    del fields["_class_name"]
    model = AutoencoderKLWan(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.decoder.conv_out.weight.mul_(4)
    return model


@functools.lru_cache  # tracing a model takes seconds
def shapes(config: WanVaeConfig) -> dict[Path, Shape]:
    """The shape of each of our parameters."""
    abstract = jax.eval_shape(functools.partial(wan_vae.init_params, config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract).items()}


def to_ours(config: WanVaeConfig, tensors: dict[str, torch.Tensor], rows=None) -> dict:
    """Their tensors (or gradients) as our tree; checks that each is used exactly once."""
    rows, ours = rows or wan_vae_keys.diffusers_rows(config), shapes(config)
    key_table.check_parameters(rows, ours)
    key_table.check_tensors(rows, ours, {name: tuple(t.shape) for name, t in tensors.items()})
    flat = {}
    for row in rows:
        whole = tuple(slice(0, size) for size in ours[row.ours])
        theirs = tensors[row.theirs].numpy()
        flat[row.ours] = row.to_ours(theirs[row.index_there(whole, ours[row.ours])], whole)
    return traverse_util.unflatten_dict(flat)


def to_theirs(tree: dict, rows: list[key_table.Row]) -> dict[str, torch.Tensor]:
    """Our tree as tensors by the names in `rows`."""
    flat, parts = traverse_util.flatten_dict(tree), {}
    for row in rows:
        offset, values = row.to_theirs(np.asarray(flat[row.ours]))
        parts.setdefault(row.theirs, {})[offset] = values
    return {
        name: torch.from_numpy(np.concatenate([given[offset] for offset in sorted(given)]))
        for name, given in parts.items()
    }


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3)


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
