"""A run that starts from adapters of a file: their product, and nothing that cannot train."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from sage_grpo_jax.config import schema
from sage_grpo_jax.models import hunyuan_video, lora
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.policy import starting_adapters
from sage_grpo_jax.training import input_checks
from sage_grpo_jax.training.blueprint import Blueprint

# Diffusers' names of some layers, and ours: path and block.
LAYERS = {
    "transformer_blocks.1.attn.to_q": (("blocks", "image", "query"), 1),
    "transformer_blocks.0.ff_context.net.2": (("blocks", "text", "mlp", "out"), 0),
    "context_embedder.token_refiner.refiner_blocks.0.attn.to_v": (
        ("text_refiner", "blocks", "value"), 0
    ),
    "proj_out": (("final", "proj"), None),
}  # fmt: skip
TARGETS = "query,mlp/out,text_refiner/blocks/value,final/proj"
SCALE = 1.5  # alpha 3, rank 2


@pytest.fixture
def written(tmp_path, make_config):
    """(file, what it adds to each kernel in float64): adapters of rank 2 of some layers."""
    rng = np.random.default_rng(0)
    transformer = networks_lib.read_networks(make_config().model).transformer
    kernels = traverse_util.flatten_dict(networks_lib.abstract_params(transformer))
    tensors, products = {}, {}
    for name, (path, layer) in LAYERS.items():
        fan_in, fan_out = kernels[(*path, "kernel")].shape[-2:]
        a, b = rng.standard_normal((2, fan_in)), rng.standard_normal((fan_out, 2))
        tensors[f"transformer.{name}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"transformer.{name}.lora_B.weight"] = b.astype(np.float32)
        tensors[f"transformer.{name}.alpha"] = np.array(3, np.float32)
        products[path] = layer, SCALE * (b.astype(np.float32) @ a.astype(np.float32)).T
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", products


def state_of(config, one_device):
    with jax.set_mesh(one_device):
        return Blueprint.read(config, one_device).fresh_state().params


def test_the_product_is_that_of_the_file(make_config, one_device, written):
    file, products = written
    config = make_config(
        {"lora.rank": 3, "lora.alpha": 12.0, "lora.targets": TARGETS, "lora.init": str(file)}
    )
    networks = networks_lib.read_networks(config.model)
    shapes = networks_lib.abstract_params(networks.transformer)
    starting_adapters.check(config.lora, networks.transformer, shapes)
    found = traverse_util.flatten_dict(state_of(config, one_device))
    plain = make_config({"lora.rank": 3, "lora.alpha": 12.0, "lora.targets": TARGETS})
    fresh = traverse_util.flatten_dict(state_of(plain, one_device))
    for path in lora.adapted_paths(config.lora.adapters, hunyuan_video):
        down, up = found[(*path, "down")], found[(*path, "up")]
        added = 4.0 * np.asarray(down, np.float64) @ np.asarray(up, np.float64)
        want, given = np.zeros_like(added), np.zeros(down.shape[:-2], bool)
        if path in products:
            layer, product = products[path]
            want[... if layer is None else layer] = product
            given[... if layer is None else layer] = True
        np.testing.assert_allclose(added, want, atol=1e-5)
        # What the file has not starts as ever: A is fresh, so B gets a gradient.
        down, plain_down = np.asarray(down), np.asarray(fresh[(*path, "down")])
        np.testing.assert_array_equal(down[~given], plain_down[~given])
        np.testing.assert_array_equal(down[..., 2:], plain_down[..., 2:])
        assert np.all(np.any(down != 0, axis=-2))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora.rank": 1}, r"lora\.init: .* has rank 2; allowed: at most lora\.rank=1"),
        ({"lora.targets": "query,mlp/out"}, "init: .* adapts text_refiner/blocks/value, final/pro"),
        ({"lora.init": "nowhere"}, r"config\.lora\.init: path=nowhere: must be a file"),
        ({"lora.targets": f"{TARGETS},byt5_embed/in"}, r"config\.lora\.targets: got byt5_embed/in"),
        ({"lora.targets": "query,mlp"}, r"config\.lora\.targets: got \('query', 'mlp'\)"),
        ({"lora.rank": 0}, r"config\.lora\.init: .* with lora\.rank=0"),
    ],
)
def test_what_does_not_fit_is_refused(make_config, written, overrides, message):
    given = {"lora.rank": 2, "lora.targets": TARGETS, "lora.init": str(written[0]), "mesh.fsdp": 8}
    with pytest.raises(ValueError, match=message):
        input_checks.check(make_config(given | overrides))


def test_nan_is_blamed_on_the_file(make_config, one_device, written):
    file, _ = written
    tensors = dict(safetensors.numpy.load_file(file))
    tensors["transformer.proj_out.lora_B.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, file)
    config = make_config({"lora.rank": 2, "lora.targets": TARGETS, "lora.init": str(file)})
    message = r"config\.lora\.init: adapters .*a\.safetensors: tensor proj_out\.lora_B.* NaN"
    with pytest.raises(ValueError, match=message):
        state_of(config, one_device)


def test_the_field_is_in_the_defaults():
    assert schema.default_config().lora.init == ""
