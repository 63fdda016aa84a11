import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.models import frames
from sage_grpo_jax.models.vae import VaeConfig


@pytest.mark.parametrize(("tiling", "overlap"), [("official", 0.125), ("diffusers", 0.25)])
def test_tiling_chooses_the_overlap(monkeypatch, tiling, overlap):
    def decode(params, latents, config, *, overlap):
        return overlap * params * latents

    monkeypatch.setattr(frames.vae_tiling, "decode_tiled", decode)
    config = VaeConfig(scaling_factor=0.5)
    out = frames.decode_frames(1.0, jnp.ones((3, 1, 1, 1, 3)), config, tiling)
    assert out.dtype == jnp.uint8
    # The latents are divided by the scaling factor once.
    np.testing.assert_array_equal(out, np.round(2 * overlap * 127.5 + 127.5))


def test_pixels_are_rounded_and_clipped():
    values = jnp.array([-2.0, -1.0, -1 + 1 / 255, 0.0, 1.0, 3.0, jnp.nan])
    np.testing.assert_array_equal(frames.to_uint8(values), [0, 0, 0, 128, 255, 255, 0])


def test_samples_with_one_bad_value_are_found():
    latents = jnp.ones((4, 2, 2)).at[1, 0, 1].set(jnp.nan).at[3, 1, 1].set(jnp.inf)
    assert frames.finite_samples(latents).tolist() == [True, False, True, False]
