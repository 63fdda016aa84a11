"""Layers that the VAEs share; what they compute is compared with diffusers in the VAEs' tests."""

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models import vae_layers


def test_gradient_of_the_norm_is_finite_where_the_input_is_zero():
    norm = vae_layers.RmsNorm()
    gradient = jax.grad(lambda x: norm.apply({"params": {"scale": jnp.ones(3)}}, x).sum())
    assert np.isfinite(gradient(jnp.zeros((1, 1, 1, 2, 3)))).all()
