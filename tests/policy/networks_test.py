"""Where a run's weights may lie: a folder, one file beside its config, a file of a release."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.policy import networks
from sage_grpo_jax.sampling import run, sources
from sage_grpo_jax.training import input_checks

FILE = "diffusion_pytorch_model.safetensors"
FOLDER = networks.ASSETS / "moving_shapes" / "transformer"


def test_a_single_file_beside_its_config(make_config, tmp_path):
    """The same network and the same values as its folder."""
    one = make_config({"model.transformer": str(FOLDER)}).model
    other = dataclasses.replace(one, transformer=str(FOLDER / FILE))
    found = networks.read_networks(other)
    assert found.transformer_path == FOLDER / FILE
    assert found.transformer == networks.read_networks(one).transformer
    input_checks.check_weights(found)
    loaded = weights.load(found.transformer_path, found.transformer)
    jax.tree.map(np.testing.assert_array_equal, loaded, weights.load(FOLDER, found.transformer))


@pytest.mark.parametrize("field", ["transformer", "vae"])
def test_a_single_file_without_a_config_is_refused(make_config, tmp_path, field):
    shutil.copy(FOLDER / FILE, tmp_path / "model.safetensors")
    config = make_config({f"model.{field}": str(tmp_path / "model.safetensors")}).model
    with pytest.raises(ValueError, match=r"has no config\.json beside it") as error:
        networks.read_networks(config)
    assert str(error.value).startswith(f"config.model.{field}: {tmp_path / 'model.safetensors'} ")
    assert "\n" not in str(error.value)


def test_a_single_file_of_a_release_needs_no_config(make_config, tmp_path):
    """The recipe knows what the variant is; tensors of another model are refused all the same."""
    shutil.copy(FOLDER / FILE, tmp_path / "model.safetensors")
    path = str(tmp_path / "model.safetensors")
    config = dataclasses.replace(
        make_config({"model.transformer": path, "model.vae": path}).model, variant="720p_i2v"
    )
    found = networks.read_networks(config)
    plain = hunyuan_video.HunyuanVideoConfig(target_size=960, task_type="i2v")
    kept = ("target_size", "task_type", "use_meanflow", "num_layers", "text_embed_dim")
    for field in kept:
        assert getattr(found.transformer, field) == getattr(plain, field)
    assert found.vae.block_out_channels == vae.VaeConfig().block_out_channels
    with pytest.raises(ValueError, match=r"config\.model\.transformer: "):
        input_checks.check_weights(found)


def test_the_flag_of_sample_is_named(make_config, tmp_path):
    shutil.copy(FOLDER / FILE, tmp_path / "model.safetensors")
    source = sources.Source(weights=str(tmp_path / "model.safetensors"))
    config = sources.adapt_config(make_config({}), source)
    with pytest.raises(ValueError, match=r"--weights: .*model\.safetensors has no config\.json"):
        run._read_networks(config, source)
