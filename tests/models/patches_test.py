"""Patches against strided convolutions of torch, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sage_grpo_jax.models import patches

PATCH = (1, 2, 3)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("absent", [0, 2])
def test_embedding_is_a_strided_convolution_in_t_major_order(absent):
    x = draw(2, 3, 4, 6, 5)
    x[..., 5 - absent :] = 0
    layer = torch.nn.Conv3d(5, 7, PATCH, PATCH)
    with torch.no_grad():
        want = layer(torch.tensor(x.transpose(0, 4, 1, 2, 3))).flatten(2).transpose(1, 2).numpy()
    params = {
        "kernel": layer.weight.detach().numpy().transpose(2, 3, 4, 1, 0),
        "bias": layer.bias.detach().numpy(),
    }
    module = patches.PatchEmbed(PATCH, 5, 7, jnp.float32)
    got = module.apply({"params": params}, x[..., : 5 - absent])
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_patches_come_back():
    x = draw(2, 3, 4, 6, 5)
    tokens = patches.patchify(x, PATCH)
    assert tokens.shape == (2, 3 * 2 * 2, 1 * 2 * 3 * 5)
    np.testing.assert_array_equal(tokens[1, 1].reshape(1, 2, 3, 5), x[1, :1, :2, 3:])
    assert patches.token_grid(x, PATCH) == (3, 2, 2)
    np.testing.assert_array_equal(patches.unpatchify(tokens, (3, 2, 2), PATCH), x)


def test_channels_first_is_the_layout_of_a_transposed_convolution():
    """A convolution that puts each number of a token, [C, pt, ph, pw], into its place."""
    grid, channels, size = (3, 2, 4), 5, 5 * 1 * 2 * 3
    tokens = draw(2, 3 * 2 * 4, size)
    places = torch.eye(size).reshape(size, channels, *PATCH)
    images = torch.tensor(tokens).transpose(1, 2).reshape(2, size, *grid)
    want = torch.nn.functional.conv_transpose3d(images, places, stride=PATCH)
    got = patches.unpatchify(tokens, grid, PATCH, channels_first=True)
    np.testing.assert_array_equal(got, want.permute(0, 2, 3, 4, 1))


def test_tokens_are_filled_up_to_the_context_axis():
    x = draw(2, 5, 3)
    same, mask = patches.pad_tokens(x)
    np.testing.assert_array_equal(same, x)
    assert mask.shape == (2, 5)
    assert mask.all()
    mesh = jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        padded, mask = jax.jit(patches.pad_tokens)(x)
    np.testing.assert_array_equal(padded, np.pad(x, ((0, 0), (0, 3), (0, 0))))
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(8) < 5, (2, 8)))
    assert padded.sharding.shard_shape(padded.shape) == (2, 2, 3)
