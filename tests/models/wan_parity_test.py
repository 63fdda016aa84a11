"""The Wan DiT against diffusers' WanTransformer3DModel: outputs, all gradients, adapters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import traverse_util
from wan_oracle import (
    TINY,
    make_inputs,
    make_oracle,
    oracle_inputs,
    oracle_output,
    ours_from_theirs,
    parameters,
)

from sage_grpo_jax.models import wan
from sage_grpo_jax.models.wan import WanConfig
from sage_grpo_jax.weights.tables import wan_keys


@dataclasses.dataclass(frozen=True)
class Case:
    """What differs from TINY, the grid of latents, text lengths, whether gradients are compared."""

    overrides: dict
    grid: tuple[int, int, int]
    lengths: tuple[int, ...] = (4, 7)
    gradients: bool = True


# Gradients take most of the time, so each path of the backward pass is in one case.
CASES = {
    "scanned": Case({}, grid=(3, 6, 10)),
    # No multiple of 6: time has more channels of a head than height and width.
    "recomputed_without_cross_norm": Case(
        {"cross_attn_norm": False, "remat": True, "num_layers": 3, "attention_head_dim": 16},
        grid=(1, 2, 6),
        lengths=(1, 0, 7),
    ),
    "unrolled_with_odd_patches": Case(
        {"patch_size": (2, 1, 3), "unroll": True, "remat": True, "num_attention_heads": 3},
        grid=(4, 5, 9),
    ),
    # Far along one axis the last bits of a rotation's frequency count.
    "far_positions": Case(
        {"patch_size": (1, 1, 1), "num_layers": 1, "attention_head_dim": 10, "eps": 1e-3},
        grid=(1, 1, 900),
        lengths=(7,),
        gradients=False,
    ),
}


def output_weights(shape) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def run_oracle(model, inputs):
    """Output, gradients of sum(output * weights) by name, and of the latents."""
    tensors = oracle_inputs(*inputs)
    out = model(**tensors, return_dict=False)[0].permute(0, 2, 3, 4, 1)
    (out * torch.tensor(output_weights(out.shape))).sum().backward()
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    latents = tensors["hidden_states"].grad.permute(0, 2, 3, 4, 1)
    return out.detach().numpy(), gradients, latents.numpy()


forward = jax.jit(wan.velocity, static_argnums=4)


@functools.partial(jax.jit, static_argnums=4)
def value_and_gradients(params, latents, timestep, condition, config):
    def loss(params, latents):
        out = wan.velocity(params, latents, timestep, condition, config)
        return jnp.sum(out * output_weights(out.shape)), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, latents)
    return out, *gradients


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_match_diffusers(name):
    case = CASES[name]
    config = dataclasses.replace(TINY, **case.overrides)
    model = make_oracle(config)
    inputs = make_inputs(config, case.grid, case.lengths)
    params = ours_from_theirs(config, parameters(model))

    if not case.gradients:
        want = oracle_output(model, *inputs)
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(forward(params, *inputs, config), want, rtol=0, atol=2e-5)
        return
    want, want_gradients, want_latents = run_oracle(model, inputs)
    assert np.abs(want).max() > 0.5
    got, got_gradients, got_latents = value_and_gradients(params, *inputs, config)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert_close_relative_to_largest(got_latents, want_latents, "latents")
    want_gradients = traverse_util.flatten_dict(ours_from_theirs(config, want_gradients))
    for path, gradient in traverse_util.flatten_dict(got_gradients).items():
        assert_close_relative_to_largest(gradient, want_gradients[path], "/".join(path))


def assert_close_relative_to_largest(got, want, name: str, tolerance: float = 2e-5) -> None:
    """|got - want| <= tolerance * max|want|, with a floor for gradients that vanish exactly."""
    got, want = np.asarray(got), np.asarray(want)
    scale = max(float(np.abs(want).max()), 1.0)
    error = float(np.abs(got - want).max())
    assert error <= tolerance * scale, f"{name}: {error} against a scale of {scale}"


def test_adapters_of_every_dense_layer_compute_what_peft_computes():
    model = make_oracle(TINY)
    params = ours_from_theirs(TINY, parameters(model))
    inputs = make_inputs(TINY, (1, 4, 6), (4, 7))
    plain = oracle_output(model, *inputs)

    rows = {row.ours: row for row in wan_keys.diffusers_rows(TINY)}
    rows = {path: rows[(*path.split("/"), "kernel")] for path in wan.ADAPTER_LAYERS}
    every = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    named = {name.removesuffix(".weight") for row in rows.values() for name in row.names()}
    assert named == set(every)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=every))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)

    flat, state = {}, parameters(model)
    for path, row in rows.items():
        for part, letter in (("down", "A"), ("up", "B")):
            layers = [state[f"{name.removesuffix('.weight')}.lora_{letter}.default.weight"].T
                      for name in row.names()]  # fmt: skip
            key = (*path.split("/"), part)
            flat[key] = layers[0] if row.stacked is None else np.stack(layers)
    adapters = traverse_util.unflatten_dict(flat)
    adapted = jax.jit(
        lambda params, adapters, *inputs: wan.velocity(params, *inputs, TINY, adapters, 1.5)
    )
    want = oracle_output(model, *inputs)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(adapted(params, adapters, *inputs), want, rtol=0, atol=2e-5)


def test_targets_of_adapters_are_the_layers_of_attention_and_mlp():
    paths = [path for paths in wan.ADAPTER_TARGETS.values() for path in paths]
    rows = {row.ours: row for row in wan_keys.diffusers_rows(WanConfig())}
    modules = {rows[(*path.split("/"), "kernel")].theirs for path in paths}
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    want = {f"blocks.{{i}}.{attention}.{end}.weight" for attention in ("attn1", "attn2")
            for end in ends}  # fmt: skip
    assert modules == want | {f"blocks.{{i}}.ffn.{end}.weight" for end in ("net.0.proj", "net.2")}
    assert len(paths) == len(modules)
