"""Tiled decoding against diffusers' tiled AutoencoderKLHunyuanVideo15."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from flax import traverse_util

from sage_grpo_jax.models import vae_tiling
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights.tables import hunyuan_vae_keys

# A latent is 2 pixels wide: tiles of 8 latents are cheap, and 1/8 of them is one latent.
CONFIG = VaeConfig(
    latent_channels=2,
    block_out_channels=(8,),
    layers_per_block=1,
    spatial_compression_ratio=2,
    temporal_compression_ratio=2,
    downsample_match_channel=False,
    upsample_match_channel=False,
)
TILE = 16


def _diffusers_model() -> AutoencoderKLHunyuanVideo15:
    fields = dataclasses.asdict(CONFIG)
    del fields["dtype"]
    return AutoencoderKLHunyuanVideo15(**fields).eval()


@pytest.fixture(scope="module")
def model() -> AutoencoderKLHunyuanVideo15:
    torch.manual_seed(0)
    model = _diffusers_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def params(model):
    tensors = {name: value.detach().numpy() for name, value in model.named_parameters()}
    flat = {}
    for row in hunyuan_vae_keys.diffusers_rows(CONFIG):
        (flat[row.ours],) = (row.layout.to_ours(tensors[name]) for name in row.names())
    return traverse_util.unflatten_dict(flat)


def _draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def _to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 4, 1, 2, 3)


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize(
    ("height", "width", "overlap"), [(4, 12, 0.25), (14, 6, 0.125)], ids=["diffusers", "official"]
)
def test_tiles_equal_diffusers(model, params, height, width, overlap):
    model.enable_tiling(TILE, TILE, TILE // 2, TILE // 2, tile_overlap_factor=overlap)
    latents = _draw(1, 2, height, width, 2)
    with torch.no_grad():
        want = model.decode(_to_torch(latents)).sample
        whole = model.decoder(_to_torch(latents))

    got = vae_tiling.decode_tiled(params, latents, CONFIG, tile=TILE, overlap=overlap)
    np.testing.assert_allclose(got, _to_numpy(want), rtol=0, atol=2e-5)
    assert np.abs(got - _to_numpy(whole)).max() > 1e-2  # tiling is not a no-op


class _PlaceCode(torch.nn.Module):
    """Stands for the decoder: each pixel depends on all of its tile before it."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = torch.cos(z.cumsum(-1).cumsum(-2))
        return z.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _place_code(x: jax.Array) -> jax.Array:
    return jnp.cos(x.cumsum(3).cumsum(2)).repeat(2, axis=3).repeat(2, axis=2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _tiled(x: jax.Array, window: int, stride: int) -> jax.Array:
    grids = [vae_tiling._Grid(n, window, stride, lambda v: 2 * v) for n in x.shape[2:4]]
    return vae_tiling._tiled(_place_code, x, grids)


# Rests of every length on both axes, a second row of tiles inside the first one, a single tile.
@pytest.mark.parametrize(
    ("overlap", "stride", "sizes"),
    [
        (0.25, 6, [(13, 21), (8, 15), (7, 8)]),
        (0.125, 7, [(14, 9), (26, 8)]),
        (0.5, 4, [(19, 12)]),
    ],
)
def test_seams_of_odd_sizes_equal_diffusers(overlap, stride, sizes):
    model = _diffusers_model()
    model.decoder = _PlaceCode()
    model.enable_tiling(TILE, TILE, TILE // 2, TILE // 2, tile_overlap_factor=overlap)
    for height, width in sizes:
        x = _draw(2, 2, height, width, 2)
        want = _to_numpy(model.decode(_to_torch(x)).sample)
        np.testing.assert_allclose(_tiled(jnp.array(x), 8, stride), want, rtol=0, atol=1e-5)


def test_tiles_are_worked_on_one_after_the_other():
    def wide(x: jax.Array) -> jax.Array:
        # 4096 temporary values for each one that goes in and comes out.
        big = jnp.sin(x[..., None] * jnp.arange(4096.0))
        return jnp.sort(big, axis=-1)[..., 7]

    def temporary(width: int) -> int:
        grids = [vae_tiling._Grid(n, 8, 6, lambda v: v) for n in (8, width)]
        x = jax.ShapeDtypeStruct((1, 1, 8, width, 1), jnp.float32)
        compiled = jax.jit(lambda x: vae_tiling._tiled(wide, x, grids)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(116) < 1.1 * temporary(20)  # 20 and 4 tiles in a row


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(15, 0.25, "tile=15: must be a multiple of the VAE's 2"), (16, 0.2, "overlap=0.2: must be"),
     (16, 0.75, "overlap=0.75: must be 0 to 0.5"), (0, 0.25, "tile=0")],
)  # fmt: skip
def test_tiles_that_do_not_come_out_whole_are_refused(params, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        vae_tiling.decode_tiled(params, _draw(1, 1, 9, 9, 2), CONFIG, tile=tile, overlap=overlap)


def test_bad_latents_are_refused(params):
    with pytest.raises(ValueError, match="channels=3: must be latent_channels=2"):
        vae_tiling.decode_tiled(params, _draw(1, 1, 9, 9, 3), CONFIG, tile=TILE)
