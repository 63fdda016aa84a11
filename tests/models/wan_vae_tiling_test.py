"""Tiled decoding against diffusers' tiled AutoencoderKLWan."""

import functools

import jax
import numpy as np
import pytest
import torch
import wan_vae_oracle as oracle
from wan_vae_oracle import channels_first, channels_last, draw

from sage_grpo_jax.models import vae_tiling, wan_vae
from sage_grpo_jax.models.wan_vae import WanVaeConfig

# A latent is 2 pixels wide: tiles of 8 latents are cheap, and a quarter of them is two latents.
CONFIG = WanVaeConfig(
    base_dim=3,
    z_dim=2,
    dim_mult=(1, 1),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.0, 0.0),
    latents_std=(1.0, 1.0),
)
TILE, STRIDE = 16, 12
# The tests run each program once: compile fast rather than for speed.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def model():
    return oracle.reference(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return oracle.to_ours(CONFIG, {k: v.detach() for k, v in model.state_dict().items()})


def test_tiles_equal_diffusers(model, params, monkeypatch):
    # Each tile is coded in pieces of time, as large ones are.
    monkeypatch.setattr(wan_vae, "_PIXELS", 1)
    latents = 2 * draw((1, 3, 4, 12, 2), 0)
    with torch.no_grad():
        whole = model.decode(channels_first(latents)).sample
        model.enable_tiling(TILE, TILE, STRIDE, STRIDE)
        want = model.decode(channels_first(latents)).sample

    tiled = functools.partial(vae_tiling.decode_tiled, config=CONFIG, tile=TILE, overlap=0.25)
    got = jax.jit(tiled, compiler_options=FAST_COMPILE)(params, latents)
    np.testing.assert_allclose(got, channels_last(want), rtol=0, atol=2e-5)
    assert np.abs(got - channels_last(whole)).max() > 1e-2  # tiling is not a no-op


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(15, 0.25, "tile=15: must be a multiple of the VAE's 2"), (16, 0.2, "overlap=0.2: must be")],
)
def test_tiles_that_do_not_come_out_whole_are_refused(params, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        vae_tiling.decode_tiled(params, draw((1, 1, 9, 9, 2), 0), CONFIG, tile=tile,
                                    overlap=overlap)  # fmt: skip


def test_bad_latents_are_refused(params):
    with pytest.raises(ValueError, match="channels=3: must be latent_channels=2"):
        vae_tiling.decode_tiled(params, draw((1, 1, 9, 9, 3), 0), CONFIG, tile=TILE)
