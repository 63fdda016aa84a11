"""What the autoencoders share: their posterior as in diffusers, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sage_grpo_jax.models import autoencoder
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.models.wan_vae import WanVaeConfig

CONFIGS = [
    VaeConfig(
        latent_channels=2,
        block_out_channels=(8, 8),
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    ),
    WanVaeConfig(
        z_dim=2,
        dim_mult=(1, 2),
        temperal_downsample=(True,),
        latents_mean=(0.0, 0.0),
        latents_std=(1.0, 1.0),
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_posterior_is_that_of_diffusers(dtype):
    moments = jnp.asarray(40 * np.random.default_rng(0).standard_normal((1, 2, 3, 2, 8)), dtype)
    theirs = torch.tensor(np.asarray(moments, np.float32)).permute(0, 4, 1, 2, 3)
    want = DiagonalGaussianDistribution(theirs)
    mean, logvar = autoencoder.posterior(moments)
    np.testing.assert_array_equal(mean, want.mean.permute(0, 2, 3, 4, 1))
    np.testing.assert_array_equal(logvar, want.logvar.permute(0, 2, 3, 4, 1))
    assert (logvar.min(), logvar.max()) == (-30, 20)
    assert mean.dtype == logvar.dtype == jnp.float32


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 4, 4, 3), "frames=4: must be 1 plus a multiple of 2"),
        ((1, 0, 4, 4, 3), "frames=0: must be 1 plus"),
        ((1, 3, 4, 5, 3), "height=4, width=5: must be multiples of 2"),
        ((1, 3, 0, 4, 3), "height=0, width=4: must be multiples of 2"),
        ((1, 3, 4, 4, 1), "channels=1: must be in_channels=3"),
    ],
)
def test_bad_clips_are_refused(config, shape, message):
    autoencoder.check_clip(jnp.zeros((1, 3, 4, 4, 3)), config)
    with pytest.raises(ValueError, match=message):
        autoencoder.check_clip(jnp.zeros(shape), config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 2, 2, 3), "channels=3: must be latent_channels=2"),
        ((1, 0, 2, 2, 2), "frames=0, height=2, width=2: must be at least 1"),
        ((1, 1, 2, 0, 2), "frames=1, height=2, width=0: must be at least 1"),
    ],
)
def test_bad_latents_are_refused(config, shape, message):
    autoencoder.check_latents(jnp.zeros((1, 1, 1, 1, 2)), config)
    with pytest.raises(ValueError, match=message):
        autoencoder.check_latents(jnp.zeros(shape), config)
