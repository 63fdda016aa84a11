"""The VAE against diffusers' AutoencoderKLHunyuanVideo15, and its own properties."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from flax import traverse_util

from sage_grpo_jax.models import vae
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights.tables import hunyuan_vae_keys

# The tests run each program once: compile fast rather than for speed.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, a clip [F, H, W], and the number of clips (diffusers takes one at a time)."""

    config: VaeConfig
    clip: tuple[int, int, int]
    batch: int = 1
    gradients: bool = True


CASES = {
    "space_8x_time_4x": Case(
        VaeConfig(
            latent_channels=4,
            block_out_channels=(8, 16, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=8,
        ),
        clip=(9, 24, 16),
        batch=2,
    ),
    "two_layers_widths_not_matched": Case(
        VaeConfig(
            latent_channels=6,
            block_out_channels=(8, 16, 24),
            layers_per_block=2,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        clip=(5, 12, 4),
    ),
    "space_16x": Case(
        VaeConfig(
            latent_channels=8,
            block_out_channels=(8, 8, 16, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=16,
        ),
        clip=(5, 16, 48),
        gradients=False,
    ),
    "space_4x_of_one_frame": Case(
        VaeConfig(
            latent_channels=2,
            block_out_channels=(16, 16, 32, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
        ),
        clip=(1, 20, 12),
        batch=2,
        gradients=False,
    ),
}


def _reference(config: VaeConfig) -> AutoencoderKLHunyuanVideo15:
    torch.manual_seed(0)
    fields = dataclasses.asdict(config)
    del fields["dtype"]
    model = AutoencoderKLHunyuanVideo15(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "bias")):  # initialised to constants, which would hide them
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _to_ours(config: VaeConfig, tensors: dict[str, torch.Tensor]) -> dict:
    """Tensors by diffusers' names as our tree; checks that each is used exactly once."""
    rows = hunyuan_vae_keys.diffusers_rows(config)
    assert sorted(row.theirs for row in rows) == sorted(tensors)
    flat = {row.ours: row.layout.to_ours(tensors[row.theirs].numpy()) for row in rows}
    assert len(flat) == len(rows)
    return traverse_util.unflatten_dict(flat)


def _channels_last(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def _draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _reference_outputs(model, video, latents, cotangents):
    """(mean, logvar, decoded) and gradients of sum(outputs * cotangents), clip by clip."""
    outputs, input_gradients = [], []
    for b in range(len(video)):
        x, z = (
            torch.tensor(a[b : b + 1]).permute(0, 4, 1, 2, 3).requires_grad_()
            for a in (video, latents)
        )
        posterior = model.encode(x).latent_dist
        results = (posterior.mean, posterior.logvar, model.decode(z).sample)
        weights = (torch.tensor(c[b : b + 1]).permute(0, 4, 1, 2, 3) for c in cotangents)
        sum((r * w).sum() for r, w in zip(results, weights, strict=True)).backward()
        outputs.append([_channels_last(r) for r in results])
        input_gradients.append([_channels_last(x.grad), _channels_last(z.grad)])
    stack = [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return stack, gradients, [np.concatenate(g) for g in zip(*input_gradients, strict=True)]


@functools.partial(jax.jit, static_argnames=("config", "gradients"), compiler_options=FAST_COMPILE)
def _ours(params, video, latents, cotangents, config, gradients):
    def weighted(params, video, latents):
        outputs = (*vae.encode(params, video, config), vae.decode(params, latents, config))
        return sum(jnp.vdot(o, c) for o, c in zip(outputs, cotangents, strict=True)), outputs

    if not gradients:
        return weighted(params, video, latents)[1], None
    (_, outputs), grads = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)(
        params, video, latents
    )
    return outputs, grads


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_diffusers(name):
    case = CASES[name]
    config, (frames, height, width) = case.config, case.clip
    s = config.spatial_compression_ratio
    latent_shape = (
        case.batch,
        1 + (frames - 1) // config.temporal_compression_ratio,
        height // s,
        width // s,
        config.latent_channels,
    )
    video, latents = _draw((case.batch, *case.clip, 3), 1), _draw(latent_shape, 2)
    # Scaled so that the gradients are of order one, like the outputs.
    cotangents = [
        _draw(shape, seed) / np.sqrt(np.prod(shape)).astype(np.float32)
        for seed, shape in ((3, latent_shape), (4, latent_shape), (5, video.shape))
    ]
    model = _reference(config)
    want, want_params, want_inputs = _reference_outputs(model, video, latents, cotangents)

    params = _to_ours(config, {k: v.detach() for k, v in model.state_dict().items()})
    got, grads = _ours(params, video, latents, cotangents, config, case.gradients)

    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
    if not case.gradients:
        return
    for ours, theirs in zip(grads[1:], want_inputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
    want_tree = traverse_util.flatten_dict(_to_ours(config, want_params))
    for path, ours in traverse_util.flatten_dict(grads[0]).items():
        np.testing.assert_allclose(ours, want_tree[path], atol=2e-5, rtol=0, err_msg=str(path))


def _tiny(**overrides) -> VaeConfig:
    fields = {
        "latent_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "temporal_compression_ratio": 2,
    }
    return VaeConfig(**(fields | overrides))


def test_the_full_model_has_the_published_number_of_parameters():
    config = VaeConfig()
    params = jax.eval_shape(functools.partial(vae.init_params, config), jax.random.key(0))
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
    assert sum(sizes.values()) == 1_260_634_115
    assert round(sizes["decoder"] / 1e5) == 8713
    ours = {row.ours for row in hunyuan_vae_keys.diffusers_rows(config)}
    assert ours == set(traverse_util.flatten_dict(params))


def test_every_axis_of_every_parameter_has_a_logical_name():
    config = _tiny()
    params = jax.eval_shape(functools.partial(vae.init_params, config), jax.random.key(0))
    names = traverse_util.flatten_dict(vae.partition_names(config))
    shapes = {path: x.shape for path, x in traverse_util.flatten_dict(params).items()}
    assert {path: len(n) for path, n in names.items()} == {p: len(s) for p, s in shapes.items()}
    assert names["encoder", "conv_in", "kernel"] == (None, None, None, "conv_in", "conv_out")
    assert names["decoder", "mid", "attention", "query", "kernel"] == ("conv_in", "conv_out")


def _random_params(config: VaeConfig) -> dict:
    """Like `init_params` without compiling a random generator for each parameter."""
    shapes = jax.eval_shape(functools.partial(vae.init_params, config), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    values = [
        _draw(x.shape, seed) * np.prod(x.shape[:-1], dtype=np.float32) ** -0.5
        for seed, x in enumerate(leaves)
    ]
    return tree.unflatten(values)


def test_parameters_are_plain_dicts_of_float32_arrays():
    init = functools.partial(vae.init_params, _tiny(dtype="bfloat16"))
    params = jax.eval_shape(init, jax.random.key(0))
    assert type(params) is dict
    assert type(params["encoder"]["mid"]) is dict
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_stays_close_to_float32_and_returns_float32():
    config = _tiny()
    params = _random_params(config)
    latents = _draw((1, 2, 3, 4, 4), 0)
    decode = jax.jit(vae.decode, static_argnums=2, compiler_options=FAST_COMPILE)
    exact = decode(params, latents, config)
    rounded = decode(params, latents, dataclasses.replace(config, dtype="bfloat16"))
    assert rounded.dtype == jnp.float32
    difference = np.abs(rounded - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()


def test_json_round_trip_with_diffusers():
    config = VaeConfig(
        latent_channels=4, block_out_channels=(8, 16, 32, 32), spatial_compression_ratio=8
    )
    theirs = AutoencoderKLHunyuanVideo15.from_config(json.loads(config.to_json()))
    assert VaeConfig.from_json(theirs.to_json_string()) == config
    assert VaeConfig.from_json(config.to_json(), dtype="bfloat16").dtype == "bfloat16"
    assert hash(VaeConfig.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spatial_compression_ratio": 6}, "spatial_compression_ratio=6: must be a power of two"),
        ({"temporal_compression_ratio": 4}, "temporal_compression_ratio=4: must be at most"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"block_out_channels": (8,)}, "needs at least 2 levels"),
        ({"block_out_channels": (8, 12)}, "multiple of 2 \\* latent_channels = 8"),
        ({"block_out_channels": (8, 64)}, "must be a multiple of 128"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _tiny(**fields)


def test_unknown_config_keys_are_refused():
    with pytest.raises(ValueError, match="unknown fields \\['sample_size'\\]"):
        VaeConfig.from_json('{"_class_name": "AutoencoderKLHunyuanVideo15", "sample_size": 3}')


def test_clips_and_latents_are_checked():
    with pytest.raises(ValueError, match="frames=4: must be 1 plus a multiple of 2"):
        vae.encode({}, jnp.zeros((1, 4, 4, 4, 3)), _tiny())
    with pytest.raises(ValueError, match="channels=3: must be latent_channels=4"):
        vae.decode({}, jnp.zeros((1, 1, 2, 2, 3)), _tiny())
