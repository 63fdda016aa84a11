"""Layouts of models: which there are, whose tensors they recognise, shapes of fresh parameters."""

import dataclasses

import jax
import pytest
import wan_oracle
from flax import traverse_util

from sage_grpo_jax.models import registry, wan
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights import layouts


def test_every_layout_has_a_name():
    assert layouts.NAMES[0] == "diffusers"
    assert set(layouts.NAMES) == {kind.layout for kind, _ in layouts.all_layouts()}
    assert {kind.class_name for kind, _ in layouts.all_layouts()} == set(registry.ENTRIES)
    assert len(set(layouts.NAMES)) == len(layouts.NAMES)


def test_shapes_are_those_of_fresh_parameters():
    config = wan_oracle.TINY
    params = wan.init_params(config, jax.random.key(0))
    want = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}
    assert layouts.parameter_shapes(config) == want
    # Fields without shapes do not matter, and nobody can change what is remembered.
    other = dataclasses.replace(config, eps=0.5, remat=not config.remat)
    layouts.parameter_shapes(other).clear()
    assert layouts.parameter_shapes(other) == want
    assert layouts.parameter_shapes(dataclasses.replace(config, ffn_dim=8)) != want


def test_tensors_are_recognised_by_one_mark():
    marks = {kind: layout.mark for kind, layout in layouts.all_layouts()}
    for kind, mark in marks.items():
        assert layouts.recognise({mark: (1,), "other": (2,)}) == kind
    assert layouts.recognise({"other": (2,)}) is None
    assert layouts.recognise(dict.fromkeys(marks.values(), (1,))) is None


def test_layouts_that_a_model_has_not():
    message = r"layout='original': must be one of \['diffusers', 'tencent'\] for a .* VAE"
    with pytest.raises(ValueError, match=message):
        layouts.rows(VaeConfig(), "original")
    with pytest.raises(ValueError, match="must be the config of one of"):
        layouts.of(object())
