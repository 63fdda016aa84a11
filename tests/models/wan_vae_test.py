"""The VAE of Wan 2.1 against diffusers' AutoencoderKLWan, and its own properties."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import wan_vae_oracle as oracle
from diffusers import AutoencoderKLWan
from flax import traverse_util
from wan_vae_oracle import draw

from sage_grpo_jax.models import wan_vae, wan_vae_layers
from sage_grpo_jax.models.wan_vae import WanVaeConfig

# The tests run each program once: compile fast rather than for speed.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def _config(**fields) -> WanVaeConfig:
    units = {"latents_mean": (0.0,) * fields["z_dim"], "latents_std": (1.0,) * fields["z_dim"]}
    return WanVaeConfig(**{"base_dim": 4, "num_res_blocks": 1, **units, **fields})


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, clips [B, F, H, W], and how many latent frames to code at once (None: all)."""

    config: WanVaeConfig
    clips: tuple[int, int, int, int]
    pieces: tuple[int | None, ...] = (None,)
    gradients: bool = False

    @property
    def latent_shape(self) -> tuple[int, ...]:
        (batch, frames, height, width), config = self.clips, self.config
        space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
        place = (height // space, width // space)
        return (batch, 1 + (frames - 1) // time, *place, config.z_dim)


CASES = {
    "as_released_9_frames": Case(
        _config(z_dim=4, dim_mult=(1, 2, 4, 4)), clips=(2, 9, 24, 8), gradients=True
    ),
    "time_first_17_frames": Case(
        _config(
            z_dim=3,
            base_dim=3,
            decoder_base_dim=5,
            dim_mult=(2, 1, 3),
            num_res_blocks=2,
            temperal_downsample=(True, True),
        ),
        clips=(1, 17, 4, 12),
        pieces=(None, 1, 3),
    ),
    "time_2x_5_frames": Case(
        _config(z_dim=2, dim_mult=(1, 2), temperal_downsample=(True,), in_channels=1),
        clips=(2, 5, 6, 2),
        pieces=(None, 1, 2),
        gradients=True,
    ),
    "one_frame": Case(
        _config(z_dim=2, dim_mult=(1, 1, 2), temperal_downsample=(False, True)),
        clips=(3, 1, 8, 4),
        pieces=(None, 1),
    ),
    "nothing_is_resampled": Case(
        _config(z_dim=2, dim_mult=(2,), temperal_downsample=()), clips=(1, 5, 3, 5)
    ),
}


def _reference_outputs(model, video, latents, cotangents):
    """(mean, logvar, decoded), and gradients of sum(outputs * cotangents)."""
    x, z = (oracle.channels_first(a).requires_grad_() for a in (video, latents))
    posterior = model.encode(x).latent_dist
    outputs = (posterior.mean, posterior.logvar, model.decode(z).sample)
    weights = map(oracle.channels_first, cotangents)
    sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    inputs = [oracle.channels_last(x.grad), oracle.channels_last(z.grad)]
    return list(map(oracle.channels_last, outputs)), gradients, inputs


@functools.partial(
    jax.jit, static_argnames=("config", "piece", "gradients"), compiler_options=FAST_COMPILE
)
def _ours(params, video, latents, cotangents, config, piece, gradients):
    def weighted(params, video, latents):
        encoded = wan_vae.encode(params, video, config, piece)
        outputs = (*encoded, wan_vae.decode(params, latents, config, piece))
        return sum(jnp.vdot(o, c) for o, c in zip(outputs, cotangents, strict=True)), outputs

    if not gradients:
        return weighted(params, video, latents)[1], None
    (_, outputs), grads = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)(
        params, video, latents
    )
    return outputs, grads


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers_in_pieces(name):
    case = CASES[name]
    config = case.config
    video = draw((*case.clips, config.in_channels), 1)
    latents = 2 * draw(case.latent_shape, 2)
    decoded_shape = (*case.clips, config.out_channels)
    # Scaled so that the gradients are of order one, like the outputs.
    cotangents = [
        draw(shape, seed) / np.sqrt(np.prod(shape)).astype(np.float32)
        for seed, shape in ((3, case.latent_shape), (4, case.latent_shape), (5, decoded_shape))
    ]
    model = oracle.reference(config)
    params = oracle.to_ours(config, {k: v.detach() for k, v in model.state_dict().items()})
    want, want_params, want_inputs = _reference_outputs(model, video, latents, cotangents)
    assert np.abs(want[2]).max() <= 1.0

    for piece in case.pieces:
        got, grads = _ours(params, video, latents, cotangents, config, piece, case.gradients)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
        if not case.gradients:
            continue
        for ours, theirs in zip(grads[1:], want_inputs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
        want_tree = traverse_util.flatten_dict(oracle.to_ours(config, want_params))
        for path, ours in traverse_util.flatten_dict(grads[0]).items():
            np.testing.assert_allclose(
                ours, want_tree[path], atol=2e-5, rtol=0, err_msg=f"{path}, {piece}"
            )
