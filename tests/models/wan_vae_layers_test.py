"""The layers of the Wan 2.1 VAE that its parity tests do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
from wan_vae_oracle import draw

from sage_grpo_jax.models import wan_vae_layers


def test_attention_frame_by_frame_equals_attention_at_once(monkeypatch):
    query, key, value = (jnp.asarray(draw((2, 3, 4, 8), seed)) for seed in range(3))

    def run(query, key, value):
        out, pullback = jax.vjp(wan_vae_layers.attention_in_frames, query, key, value)
        return out, *pullback(jnp.cos(out))

    at_once = jax.jit(run)(query, key, value)
    monkeypatch.setattr(wan_vae_layers, "_DENSE_SCORES", 1)
    one_by_one = jax.jit(lambda *args: run(*args))(query, key, value)
    for got, want in zip(one_by_one, at_once, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
