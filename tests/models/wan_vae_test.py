"""The VAE of Wan 2.1 against diffusers' AutoencoderKLWan, and its own properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import wan_vae_oracle as oracle
from diffusers import AutoencoderKLWan
from flax import traverse_util
from wan_vae_oracle import draw

from sage_grpo_jax.models import wan_vae
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
    "as_released_9_frames": Case(_config(z_dim=4, dim_mult=(1, 2, 4, 4)), clips=(2, 9, 24, 8)),
    "time_first_17_frames": Case(
        _config(
            z_dim=3,
            base_dim=3,
            decoder_base_dim=5,
            dim_mult=(2, 1, 3),
            temperal_downsample=(True, True),
        ),
        clips=(1, 17, 4, 12),
        pieces=(None, 3),
    ),
    "time_2x_5_frames": Case(
        _config(z_dim=2, dim_mult=(1, 2), temperal_downsample=(True,), in_channels=1),
        clips=(2, 5, 6, 2),
        pieces=(None, 1),
        gradients=True,
    ),
    "one_frame": Case(
        _config(z_dim=2, dim_mult=(1, 2), num_res_blocks=2, temperal_downsample=(True,)),
        clips=(3, 1, 6, 4),
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
    assert 0 < np.mean(np.abs(want[2]) == 1) < 0.5  # some pixels are clipped, not all

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


def _tiny(**fields) -> WanVaeConfig:
    return _config(**({"z_dim": 2, "dim_mult": (1, 2), "temperal_downsample": (True,)} | fields))


def _random_params(config: WanVaeConfig) -> dict:
    """Like `init_params` without compiling a random generator for each parameter."""
    flat = {
        path: draw(shape, seed) * np.prod(shape[:-1], dtype=np.float32) ** -0.5
        for seed, (path, shape) in enumerate(oracle.shapes(config).items())
    }
    return traverse_util.unflatten_dict(flat)


def test_the_full_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        theirs = AutoencoderKLWan()
    sizes = {
        part: sum(np.prod(shape) for path, shape in oracle.shapes(WanVaeConfig()).items()
                  if path[0] == part)
        for part in ("encoder", "decoder")
    }  # fmt: skip
    assert sum(sizes.values()) == sum(p.numel() for p in theirs.parameters()) == 126_892_531


def test_every_axis_of_every_parameter_has_a_logical_name():
    config = _tiny()
    names = traverse_util.flatten_dict(wan_vae.partition_names(config))
    shapes = oracle.shapes(config)
    assert {path: len(n) for path, n in names.items()} == {p: len(s) for p, s in shapes.items()}
    assert names["encoder", "conv_in", "kernel"] == (None, None, None, "conv_in", "conv_out")
    assert names["decoder", "up_0", "upsample", "conv", "kernel"][2:] == ("conv_in", "conv_out")
    assert names["decoder", "mid", "attention", "query", "kernel"] == ("conv_in", "conv_out")


def test_parameters_are_plain_dicts_of_float32_arrays():
    init = functools.partial(wan_vae.init_params, _tiny(dtype="bfloat16"))
    params = jax.eval_shape(init, jax.random.key(0))
    assert set(params) == {"encoder", "decoder"}
    assert type(params["encoder"]["mid"]) is dict
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_stays_close_to_float32_and_returns_float32():
    config = _tiny()
    params, latents = _random_params(config), draw((1, 3, 3, 4, 2), 0)
    decode = jax.jit(wan_vae.decode, static_argnums=(2, 3), compiler_options=FAST_COMPILE)
    exact = decode(params, latents, config, None)
    rounded = decode(params, latents, dataclasses.replace(config, dtype="bfloat16"), 1)
    assert rounded.dtype == jnp.float32
    difference = np.abs(rounded - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()


def test_large_clips_take_the_memory_of_one_piece(monkeypatch):
    config = _tiny()
    params = jax.eval_shape(functools.partial(wan_vae.init_params, config), jax.random.key(0))

    def temporary(frames: int, latent_frames: int | None = None) -> int:
        latents = jax.ShapeDtypeStruct((1, frames, 8, 8, 2), jnp.float32)
        decode = jax.jit(lambda p, z: wan_vae.decode(p, z, config, latent_frames))
        compiled = decode.lower(params, latents).compile(FAST_COMPILE)
        return compiled.memory_analysis().temp_size_in_bytes

    # Without the frames that come out, 16 * 16 pixels of 3 colours, held twice at most.
    pixels = 2 * 20 * 2 * 16 * 16 * 3 * 4
    assert temporary(25, 1) < temporary(5, 1) + pixels
    small = temporary(25)
    assert small > 3 * temporary(5)
    # Two latent frames are four frames of 16 x 16 pixels.
    monkeypatch.setattr(wan_vae, "_PIXELS", 2 * 2 * 16 * 16)
    assert temporary(25) == temporary(25, 2) < small


def test_latents_of_the_diffusion_model_are_centred_and_scaled_by_channel():
    config, means = WanVaeConfig(), draw((1, 2, 3, 2, 16), 0)
    # As diffusers' WanPipeline goes back: divided by 1 / std, plus the mean.
    std, mean = (torch.tensor(units) for units in (config.latents_std, config.latents_mean))
    latents = np.asarray(wan_vae.to_model_latents(means, config))
    want = (torch.tensor(latents) / (1.0 / std) + mean).numpy()
    np.testing.assert_allclose(wan_vae.to_vae_latents(latents, config), want, atol=2e-6)
    np.testing.assert_allclose(want, means, atol=2e-6)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents[..., 1], (means[..., 1] + 0.7089) / 1.4541, atol=1e-6)
