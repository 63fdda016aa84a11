"""The layers of the HunyuanVideo-1.5 VAE that its parity tests do not reach."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models import hunyuan_vae_layers


def _draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_kernels_start_with_unit_gain():
    conv = hunyuan_vae_layers.CausalConv(64, jnp.float32)
    params = nn.unbox(conv.init(jax.random.key(0), jnp.zeros((1, 1, 1, 1, 16))))["params"]
    np.testing.assert_allclose(params["kernel"].std(), (27 * 16) ** -0.5, rtol=0.02)
    assert not params["bias"].any()


def test_attention_frame_by_frame_equals_attention_at_once(monkeypatch):
    query, key, value = (jnp.asarray(_draw((2, 3, 4, 8), seed)) for seed in range(3))

    def run(query, key, value):
        out, pullback = jax.vjp(hunyuan_vae_layers.frame_causal_attention, query, key, value)
        return out, *pullback(jnp.cos(out))

    at_once = jax.jit(run)(query, key, value)
    monkeypatch.setattr(hunyuan_vae_layers, "_DENSE_ATTENTION_TOKENS", 1)
    one_by_one = jax.jit(lambda *args: run(*args))(query, key, value)
    for got, want in zip(one_by_one, at_once, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
