"""What the transformers share: adapters on the way into the network, and what is refused."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.models import layer_stack, transformer

RNG = np.random.default_rng(0)
CONFIG = types.SimpleNamespace(
    num_layers=2, remat=False, unroll=False, patch=(1, 2, 3), out_channels=4
)
SCALE = 0.7


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


class Block(nn.Module):
    config: types.SimpleNamespace

    @nn.compact
    def __call__(self, x, shift):
        return x + jnp.tanh(nn.Dense(4, use_bias=False, name="mix")(x)) + shift, None


class Network(nn.Module):
    """A stack of layers between time and text, and a last one."""

    config: types.SimpleNamespace

    @nn.compact
    def __call__(self, latents, timestep, condition, adapters=None, scale=1.0):
        shift = (timestep[:, None] + condition)[:, None, None, None]
        x = layer_stack.blocks(self, Block, latents, (shift,), adapters, scale)
        return nn.Dense(4, use_bias=False, name="proj")(x)


@pytest.mark.parametrize("adapted", [False, True])
def test_velocity_is_that_of_the_merged_kernels(adapted):
    """Blocks and the rest have adapters; in float64."""
    mix, proj = draw(2, 4, 4), draw(4, 4)
    params = {"blocks": {"mix": {"kernel": mix}}, "proj": {"kernel": proj}}
    adapters = None
    inputs = draw(3, 1, 2, 3, 4), draw(3), draw(3, 4)
    if adapted:
        adapters = {
            "blocks": {"mix": {"down": draw(2, 4, 2), "up": draw(2, 2, 4)}},
            "proj": {"down": draw(4, 2), "up": draw(2, 4)},
        }
    got = transformer.velocity(Network(CONFIG), params, *inputs, adapters, SCALE)

    latents, timestep, condition, mix, proj = (x.astype(np.float64) for x in (*inputs, mix, proj))
    if adapted:
        given = jax.tree.map(np.float64, adapters)
        mix = mix + SCALE * given["blocks"]["mix"]["down"] @ given["blocks"]["mix"]["up"]
        proj = proj + SCALE * given["proj"]["down"] @ given["proj"]["up"]
    x = latents
    for kernel in mix:
        x = x + np.tanh(x @ kernel) + (timestep[:, None] + condition)[:, None, None, None]
    np.testing.assert_allclose(got, x @ proj, rtol=1e-4, atol=1e-4)


GOOD = {
    "latents": np.zeros((2, 1, 4, 6, 4)),
    "timestep": np.zeros(2),
    "text": np.zeros((2, 5, 8)),
    "text_mask": np.ones((2, 5), bool),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": np.zeros((2, 1, 5, 6, 4))}, "latents axis H=5: must be a multiple of .* 2"),
        ({"latents": np.zeros((2, 1, 4, 7, 4))}, "latents axis W=7: must be a multiple of .* 3"),
        (
            {"latents": np.zeros((2, 1, 4, 6, 3))},
            r"latents\.shape=\(2, 1, 4, 6, 3\): .* 4\)",
        ),
        ({"timestep": np.zeros(3)}, r"timestep\.shape=\(3,\): must be \(2,\)"),
        ({"text": np.zeros((2, 5, 7))}, r"condition\.text\.shape=\(2, 5, 7\): must be .* 8\)"),
        ({"text": np.zeros((3, 5, 8))}, r"condition\.text\.shape=\(3, 5, 8\): must be \(2,"),
        ({"text_mask": np.ones((2, 4), bool)}, r"condition\.text_mask\.shape=\(2, 4\)"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    transformer.check_inputs(**GOOD, config=CONFIG, text_width=8)
    with pytest.raises(ValueError, match=message):
        transformer.check_inputs(**(GOOD | change), config=CONFIG, text_width=8)
