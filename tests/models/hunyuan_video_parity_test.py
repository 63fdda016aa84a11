"""The DiT against diffusers' HunyuanVideo15Transformer3DModel: outputs and all gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from flax import traverse_util

from sage_grpo_jax.models import hunyuan_video, model_config
from sage_grpo_jax.models.hunyuan_video import Condition, HunyuanVideoConfig
from sage_grpo_jax.weights.tables import hunyuan_video_keys

TINY = HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_refiner_layers=1,
    mlp_ratio=3.0,
    text_embed_dim=10,
    text_embed_2_dim=6,
    image_embed_dim=5,
    rope_axes_dim=(4, 4, 4),
    remat=False,
)
NARROW = {"text_embed_2_dim": None, "image_embed_dim": None}


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, a latent grid, which optional inputs are given, whether gradients are compared."""

    overrides: dict
    grid: tuple[int, int, int] = (3, 5, 3)
    text_lengths: tuple[int, ...] = (4, 7)
    byt5_lengths: tuple[int, ...] | None = None
    image_tokens: int = 0
    condition_latents: bool = True
    timestep_r: bool = False
    gradients: bool = True


# Gradients take most of the time, so each path of the backward pass is in one case.
CASES = {
    "everything": Case(
        {"use_meanflow": True, "num_layers": 3, "num_refiner_layers": 2},
        byt5_lengths=(2, 4),
        image_tokens=2,
        timestep_r=True,
    ),
    "no_optional_parts": Case(NARROW, condition_latents=False),
    "patches_recomputed": Case(
        {"patch_size": 2, "patch_size_t": 2, "remat": True, **NARROW}, grid=(2, 2, 6)
    ),
    "moving_shapes_unrolled": Case(
        {
            "in_channels": 33,
            "out_channels": 16,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 3,
            "text_embed_dim": 32,
            "rope_axes_dim": (8, 12, 12),
            "unroll": True,
            **NARROW,
        },
        grid=(5, 4, 4),
        text_lengths=(14, 9),
        condition_latents=False,
    ),
    "parts_unused": Case({}, gradients=False),
    "vision": Case({"patch_size": 2}, grid=(3, 6, 2), image_tokens=3, gradients=False),
    "empty_text": Case({}, text_lengths=(0, 7), byt5_lengths=(2, 0), gradients=False),
    "many_heads": Case(
        {
            "num_layers": 1,
            "num_attention_heads": 5,
            "attention_head_dim": 16,
            "rope_axes_dim": (2, 6, 8),
            "mlp_ratio": 2.0,
            "rope_theta": 100.0,
            **NARROW,
        },
        grid=(1, 7, 5),
        gradients=False,
    ),
}


def make_config(case: Case) -> HunyuanVideoConfig:
    return dataclasses.replace(TINY, **case.overrides)


def make_oracle(config: HunyuanVideoConfig) -> HunyuanVideo15Transformer3DModel:
    """diffusers' model with every parameter random; it always has ByT5 and vision parts."""
    fields = dataclasses.asdict(config)
    for name in model_config.RUNTIME_FIELDS:
        del fields[name]
    fields["text_embed_2_dim"] = fields["text_embed_2_dim"] or 6
    fields["image_embed_dim"] = fields["image_embed_dim"] or 5
    torch.manual_seed(0)
    model = HunyuanVideo15Transformer3DModel(**fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 50.0
            parameter.normal_(std=fan_in**-0.5)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1.0)
    return model


def ours_from_theirs(config: HunyuanVideoConfig, tensors: dict[str, np.ndarray]) -> dict:
    flat = {}
    for row in hunyuan_video_keys.diffusers_rows(config):
        layers = [row.layout.to_ours(tensors[name]) for name in row.names()]
        flat[row.ours] = jnp.asarray(layers[0] if row.stacked is None else np.stack(layers))
    return traverse_util.unflatten_dict(flat)


def make_inputs(case: Case, config: HunyuanVideoConfig) -> tuple[np.ndarray, np.ndarray, Condition]:
    rng = np.random.default_rng(0)
    batch = len(case.text_lengths)

    def normal(*shape):
        return rng.standard_normal((batch, *shape), np.float32)

    def mask(lengths):
        return np.arange(max(lengths) + 1) < np.array(lengths)[:, None]

    condition = Condition(
        text=normal(max(case.text_lengths) + 1, config.text_embed_dim),
        text_mask=mask(case.text_lengths),
    )
    if case.byt5_lengths is not None:
        byt5_mask = mask(case.byt5_lengths)
        byt5 = normal(byt5_mask.shape[1], config.text_embed_2_dim)
        condition = condition._replace(byt5=byt5, byt5_mask=byt5_mask)
    if case.image_tokens:
        condition = condition._replace(image=normal(case.image_tokens, config.image_embed_dim))
    if case.condition_latents:
        extra = normal(*case.grid, config.in_channels - config.out_channels)
        condition = condition._replace(latents=extra)
    if case.timestep_r:
        condition = condition._replace(timestep_r=np.array([0.0, 312.5], np.float32))
    return normal(*case.grid, config.out_channels), np.array([993.71, 41.3], np.float32), condition


def run_oracle(model, latents, timestep, condition: Condition, config):
    """Output [B, T, H, W, C], gradients of sum(output * weights) by name, and of the latents."""
    batch = latents.shape[0]
    extra = condition.latents
    if extra is None:
        extra = np.zeros((*latents.shape[:4], config.in_channels - config.out_channels), np.float32)
    noisy = torch.tensor(latents.transpose(0, 4, 1, 2, 3), requires_grad=True)
    extra = torch.tensor(extra.transpose(0, 4, 1, 2, 3))

    def given(value, width):
        return np.zeros((batch, 2, width), np.float32) if value is None else value

    byt5 = given(condition.byt5, model.config.text_embed_2_dim)
    byt5_mask = condition.byt5_mask
    if byt5_mask is None:
        byt5_mask = np.zeros(byt5.shape[:2], bool)
    image = given(condition.image, model.config.image_embed_dim)
    out = model(
        hidden_states=torch.cat([noisy, extra], dim=1),
        timestep=torch.tensor(timestep),
        encoder_hidden_states=torch.tensor(condition.text),
        encoder_attention_mask=torch.tensor(condition.text_mask).long(),
        timestep_r=None if condition.timestep_r is None else torch.tensor(condition.timestep_r),
        encoder_hidden_states_2=torch.tensor(byt5),
        encoder_attention_mask_2=torch.tensor(byt5_mask).long(),
        image_embeds=torch.tensor(image),
        return_dict=False,
    )[0]
    out = out.permute(0, 2, 3, 4, 1)
    (out * torch.tensor(output_weights(out.shape))).sum().backward()
    gradients = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
    }
    return out.detach().numpy(), gradients, noisy.grad.permute(0, 2, 3, 4, 1).numpy()


def output_weights(shape) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def jit(function):
    """Compiled without LLVM's optimisations, which take longer than these small runs."""
    return functools.partial(
        jax.jit, static_argnums=4, compiler_options={"xla_backend_optimization_level": 0}
    )(function)


forward = jit(hunyuan_video.velocity)


@jit
def value_and_gradients(params, latents, timestep, condition, config):
    def loss(params, latents):
        out = hunyuan_video.velocity(params, latents, timestep, condition, config)
        return jnp.sum(out * output_weights(out.shape)), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, latents)
    return out, *gradients


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_match_diffusers(name):
    case = CASES[name]
    config = make_config(case)
    model = make_oracle(config)
    inputs = make_inputs(case, config)
    want, want_gradients, want_latents = run_oracle(model, *inputs, config)
    tensors = {key: value.detach().numpy() for key, value in model.named_parameters()}
    params = ours_from_theirs(config, tensors)
    assert np.abs(want).max() > 0.5

    if not case.gradients:
        np.testing.assert_allclose(forward(params, *inputs, config), want, rtol=0, atol=2e-5)
        return
    got, got_gradients, got_latents = value_and_gradients(params, *inputs, config)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert_close_relative_to_largest(got_latents, want_latents, "latents")
    want_gradients = traverse_util.flatten_dict(ours_from_theirs(config, want_gradients))
    for path, gradient in traverse_util.flatten_dict(got_gradients).items():
        assert_close_relative_to_largest(gradient, want_gradients[path], "/".join(path))


def assert_close_relative_to_largest(got, want, name: str, tolerance: float = 1e-4) -> None:
    """|got - want| <= tolerance * max|want|, with a floor for gradients that vanish exactly."""
    got, want = np.asarray(got), np.asarray(want)
    scale = max(float(np.abs(want).max()), 1e-2)
    error = float(np.abs(got - want).max())
    assert error <= tolerance * scale, f"{name}: {error} against a scale of {scale}"
