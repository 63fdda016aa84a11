"""Wan's key tables: conversions bit for bit, through files and with diffusers' own converter."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from flax import traverse_util
from wan_oracle import TINY, make_inputs, make_oracle, oracle_output, parameters

from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.models import wan
from sage_grpo_jax.weights import sources, store
from sage_grpo_jax.weights.formats import safetensors_io
from sage_grpo_jax.weights.tables import key_table, wan_keys

STEM = "diffusion_pytorch_model"
CONFIGS = {
    "cross_norm": TINY,
    "no_cross_norm": dataclasses.replace(
        TINY, cross_attn_norm=False, num_layers=3, patch_size=(2, 1, 3), attention_head_dim=10
    ),
}
TABLES = {"diffusers": wan_keys.diffusers_rows, "original": wan_keys.original_rows}


@functools.cache
def shapes_of(config):
    abstract = jax.eval_shape(functools.partial(wan.init_params, config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract).items()}


def read(folder, rows, config):
    """Our parameters from the safetensors in a folder."""
    tensors = safetensors_io.read_files(folder)
    source = sources.TensorSource(rows, shapes_of(config), tensors)
    return {path: np.asarray(source.read(path, tuple(slice(0, n) for n in shape)))
            for path, shape in source.shapes.items()}  # fmt: skip


def write(folder, rows, params):
    folder.mkdir()
    source = sources.TreeSource(traverse_util.unflatten_dict(params))
    store.write_tensors(folder, STEM, rows, source, np.dtype(np.float32), Progress(0, None))


@pytest.mark.parametrize("layout", TABLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_parameter_has_a_row(name, layout):
    key_table.check_parameters(TABLES[layout](CONFIGS[name]), shapes_of(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_from_diffusers_and_back_bit_for_bit(name, tmp_path):
    config, rows = CONFIGS[name], wan_keys.diffusers_rows(CONFIGS[name])
    model = make_oracle(config)
    model.save_pretrained(tmp_path / "theirs")
    params = read(tmp_path / "theirs", rows, config)

    write(tmp_path / "ours", rows, params)
    (tmp_path / "ours" / "config.json").write_text(config.to_json())
    again = WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    state, want = again.state_dict(), model.state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(state[tensor], want[tensor]) for tensor in want)

    saved, given = (
        WanTransformer3DModel.load_config(tmp_path / folder) for folder in ("ours", "theirs")
    )
    kept = {key: value for key, value in given.items() if not key.startswith("_")}
    assert {key: value for key, value in saved.items() if not key.startswith("_")} == kept


@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_layout_is_what_diffusers_converts(name, tmp_path):
    config, original = CONFIGS[name], wan_keys.original_rows(CONFIGS[name])
    model = make_oracle(config)
    model.save_pretrained(tmp_path / "diffusers")
    params = read(tmp_path / "diffusers", wan_keys.diffusers_rows(config), config)

    write(tmp_path / "original", original, params)
    state = safetensors.torch.load_file(tmp_path / "original" / f"{STEM}.safetensors")
    assert "blocks.1.self_attn.o.weight" in state
    assert "head.modulation" in state
    converted, want = convert_wan_transformer_to_diffusers(state), model.state_dict()
    assert converted.keys() == want.keys()
    assert all(torch.equal(converted[tensor], want[tensor]) for tensor in want)

    back = read(tmp_path / "original", original, config)
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value)


def test_a_checkpoint_of_another_model_is_refused_by_name():
    config = CONFIGS["cross_norm"]
    tensors = {name: value.shape for name, value in parameters(make_oracle(config)).items()}
    rows, shapes = wan_keys.diffusers_rows(config), shapes_of(config)
    key_table.check_tensors(rows, shapes, tensors)
    image = tensors | {"blocks.0.attn2.add_k_proj.weight": (24, 24)}
    with pytest.raises(ValueError, match=r"unexpected: blocks\.0\.attn2\.add_k_proj\.weight"):
        key_table.check_tensors(rows, shapes, image)
    del tensors["blocks.1.scale_shift_table"]
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.scale_shift_table"):
        key_table.check_tensors(rows, shapes, tensors)


def test_what_we_write_computes_in_diffusers_what_we_compute(tmp_path):
    """From our own fresh parameters, made random, to diffusers: no oracle's weights come in."""
    rng = np.random.default_rng(5)
    params = {path: rng.normal(0.05, 0.2, shape).astype(np.float32)
              for path, shape in shapes_of(TINY).items()}  # fmt: skip
    write(tmp_path / "ours", wan_keys.diffusers_rows(TINY), params)
    (tmp_path / "ours" / "config.json").write_text(TINY.to_json())
    model = WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    inputs = make_inputs(TINY, (2, 4, 2), (3, 7))
    want = oracle_output(model, *inputs)
    forward = jax.jit(wan.velocity, static_argnums=4)
    got = forward(traverse_util.unflatten_dict(params), *inputs, TINY)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
