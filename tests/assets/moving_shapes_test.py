"""The shipped weights: small, complete, and of the shapes that their recipe says."""

import pathlib

import jax
import numpy as np
import pytest

import sage_grpo_jax
from sage_grpo_jax import weights
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig

FOLDER = pathlib.Path(sage_grpo_jax.__file__).parent / "assets" / "moving_shapes"


def test_all_files_together_are_small():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) <= 8_000_000


@pytest.mark.parametrize(
    ("name", "kind"), [("vae", VaeConfig), ("transformer", HunyuanVideoConfig)]
)
def test_weights_load_and_are_trained(name, kind):
    config = weights.load_config(FOLDER / name)
    assert isinstance(config, kind)
    params = weights.load(FOLDER / name, config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == np.float32
        assert np.isfinite(leaf).all(), path
        # Fresh biases are zero: training has touched all of them that a gradient reaches.
        assert np.any(leaf != 0), path


def test_the_models_fit_together():
    autoencoder = weights.load_config(FOLDER / "vae")
    transformer = weights.load_config(FOLDER / "transformer")
    assert transformer.out_channels == autoencoder.latent_channels
    assert transformer.in_channels == 2 * autoencoder.latent_channels + 1
    assert transformer.hidden_size >= 4 * autoencoder.latent_channels
    assert 0.1 < autoencoder.scaling_factor < 10
