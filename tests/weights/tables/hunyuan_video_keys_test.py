"""The DiT in both layouts: files of an independent writer, and what diffusers computes of them."""

import dataclasses
import json

import jax
import numpy as np
import official_layout as official
import pytest
import safetensors.torch
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit")
    tensors = official.dit_to_official(official.dit_oracle().state_dict())
    safetensors.torch.save_file(tensors, path / official.FILE)
    (path / "config.json").write_text(json.dumps(official.DIT_JSON))
    return path


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_dit_computes_as_diffusers_does(dit_folder):
    config = dataclasses.replace(weights.load_config(dit_folder), remat=False)
    assert config == official.DIT
    params = weights.load(dit_folder, config)
    want = official.dit_oracle_output(official.dit_oracle())
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(official.dit_output(params), want, rtol=0, atol=TOLERANCE)


def test_dit_comes_back_tensor_by_tensor(dit_folder, tmp_path):
    params = weights.load(dit_folder, official.DIT)
    weights.save(params, tmp_path / "out", "tencent", config=official.DIT)
    want = safetensors.torch.load_file(dit_folder / official.FILE)
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "out" / official.FILE), want)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    given = {k: v for k, v in official.DIT_JSON.items() if k != "_diffusers_version"}
    assert written == given


def test_dit_reaches_diffusers(dit_folder, tmp_path):
    params = weights.load(dit_folder, official.DIT)
    weights.save(params, tmp_path / "out", config=official.DIT)
    model = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out")
    assert_same_tensors(model.state_dict(), official.dit_oracle().state_dict())


def test_slices_of_fused_and_swapped_tensors(dit_folder):
    """Every parameter is split on its first and last axes: parts and halves are cut through."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(leaf):
        axes = [None] * leaf.ndim
        if leaf.shape[-1] % 4 == 0:
            axes[-1] = "b"
        if leaf.ndim > 1 and leaf.shape[-2] % 2 == 0:
            axes[-2] = "a"
        return jax.NamedSharding(mesh, jax.P(*axes))

    abstract = jax.eval_shape(
        lambda key: hunyuan_video.init_params(official.DIT, key), jax.random.key(0)
    )
    shardings = jax.tree.map(sharding, abstract)
    found = weights.load(dit_folder, official.DIT, shardings)
    jax.tree.map(np.testing.assert_array_equal, found, weights.load(dit_folder, official.DIT))
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
