"""The VAE in both layouts: files of an independent writer, and what diffusers computes of them."""

import dataclasses
import json

import jax
import numpy as np
import official_layout as official
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKLHunyuanVideo15

from sage_grpo_jax import weights
from sage_grpo_jax.models import vae

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    tensors = official.vae_to_official(official.vae_oracle().state_dict())
    safetensors.torch.save_file(tensors, path / official.FILE)
    (path / "config.json").write_text(json.dumps(official.VAE_JSON))
    return path


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_vae_computes_as_diffusers_does(vae_folder):
    config = weights.load_config(vae_folder)
    assert config == official.VAE
    found = official.vae_output(weights.load(vae_folder, config))
    for got, want in zip(found, official.vae_oracle_output(official.vae_oracle()), strict=True):
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_vae_comes_back_and_reaches_diffusers(vae_folder, tmp_path):
    params = weights.load(vae_folder, official.VAE)
    weights.save(params, tmp_path / "tencent", "tencent", config=official.VAE)
    want = safetensors.torch.load_file(vae_folder / official.FILE)
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "tencent" / official.FILE), want)
    assert json.loads((tmp_path / "tencent" / "config.json").read_text()) == official.VAE_JSON

    weights.save(params, tmp_path / "diffusers", config=official.VAE)
    model = AutoencoderKLHunyuanVideo15.from_pretrained(tmp_path / "diffusers")
    assert_same_tensors(model.state_dict(), official.vae_oracle().state_dict())


def test_vae_with_shortcuts(tmp_path):
    """Levels whose width changes within a resnet have one more convolution."""
    fields = {"downsample_match_channel": False, "upsample_match_channel": False}
    config = dataclasses.replace(official.VAE, **fields)
    torch.manual_seed(2)
    oracle = AutoencoderKLHunyuanVideo15.from_config(json.loads(config.to_json()))
    tensors = official.vae_to_official(oracle.state_dict())
    assert any("nin_shortcut" in name for name in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**official.VAE_JSON, **fields}))
    params = weights.load(tmp_path / "vae.safetensors", weights.load_config(tmp_path))
    abstract = jax.eval_shape(lambda key: vae.init_params(config, key), jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    weights.save(params, tmp_path / "out", config=config)
    model = AutoencoderKLHunyuanVideo15.from_pretrained(tmp_path / "out")
    assert_same_tensors(model.state_dict(), oracle.state_dict())
