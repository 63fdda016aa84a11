"""Patches against a strided convolution of torch, and the way back."""

import jax.numpy as jnp
import numpy as np
import torch

from sage_grpo_jax.models import patches

PATCH = (1, 2, 3)


def test_embedding_is_a_strided_convolution_in_t_major_order():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6, 5), np.float32)
    layer = torch.nn.Conv3d(5, 7, PATCH, PATCH)
    with torch.no_grad():
        want = layer(torch.tensor(x.transpose(0, 4, 1, 2, 3))).flatten(2).transpose(1, 2).numpy()
    params = {
        "kernel": layer.weight.detach().numpy().transpose(2, 3, 4, 1, 0),
        "bias": layer.bias.detach().numpy(),
    }
    module = patches.PatchEmbed(PATCH, 7, jnp.float32)
    np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=1e-6)


def test_patches_come_back():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6, 5))
    tokens = patches.patchify(x, PATCH)
    assert tokens.shape == (2, 3 * 2 * 2, 1 * 2 * 3 * 5)
    np.testing.assert_array_equal(tokens[1, 1].reshape(1, 2, 3, 5), x[1, :1, :2, 3:])
    np.testing.assert_array_equal(patches.unpatchify(tokens, (3, 2, 2), PATCH), x)
