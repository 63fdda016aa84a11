"""Adapters of other programs: what peft and diffusers train and save is what we load, and compute.

The truth is diffusers' model with peft's adapters in it; which layers they adapt is left to peft.
"""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import official_layout as official
import peft
import pytest
import safetensors.torch
import torch
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from flax import traverse_util

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video, lora
from sage_grpo_jax.weights import adapters as adapters_lib

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERY = [name for name, module in official.dit_oracle().named_modules()
         if isinstance(module, torch.nn.Linear)]  # fmt: skip
# What peft is asked to adapt, and what we say that it did not.
CASES = {
    "attention": (
        {"target_modules": ATTENTION},
        "mlp/in, mlp/out, blocks/text/query, blocks/text/key, blocks/text/value, blocks/text/proj",
    ),
    "image_stream": (
        {"target_modules": r"transformer_blocks.\d+.(attn.to_.|attn.to_out.0|ff.net.(0.proj|2))"},
        "blocks/text/query, blocks/text/key, blocks/text/value, blocks/text/proj, "
        "blocks/text/mlp/in, blocks/text/mlp/out",
    ),
    "some_layers": (
        {"target_modules": ["add_q_proj", "to_q"], "layers_to_transform": [0, 2],
         "layers_pattern": "transformer_blocks"},
        "key, value, proj, mlp/in, mlp/out; layers 1 of query",
    ),
    "refiner": (
        {"target_modules": r".*refiner_blocks\.1\.(attn\.to_v|ff\.net\.2|norm_out\.linear)"},
        "query, key, value, proj, mlp/in, mlp/out",
    ),
    "everything": ({"target_modules": EVERY}, ""),
    "ranks": (
        {"target_modules": [*ATTENTION, "ff.net.2"], "rank_pattern": {"to_k": 2, "net.2": 5},
         "alpha_pattern": {"to_v": 1.5, "transformer_blocks.1.attn.to_q": 9}},
        None,
    ),
    "rank_stabilised": ({"target_modules": ["to_v", "add_v_proj"], "use_rslora": True}, None),
}  # fmt: skip


def peft_config(case):
    return peft.LoraConfig(r=3, lora_alpha=4, **CASES[case][0])


def randomise(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


@functools.cache
def adapted(case):
    """diffusers' model with random adapters, and what it computes."""
    model = copy.deepcopy(official.dit_oracle())
    model.add_adapter(peft_config(case))
    randomise(model)
    return model, official.dit_oracle_output(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    official.dit_oracle().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def params(base):
    return weights.load(base, official.DIT)


def same_outputs(params, found, config, want):
    assert np.abs(want - official.dit_oracle_output(official.dit_oracle())).max() > 0.05
    merged = lora.merge(params, found, config.scale)
    np.testing.assert_allclose(official.dit_output(merged), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_diffusers_saves(case, params, tmp_path, caplog):
    model, want = adapted(case)
    model.save_lora_adapter(tmp_path)
    found, config = weights.load_adapters(tmp_path, official.DIT)
    same_outputs(params, found, config, want)
    told = CASES[case][1]
    if told is not None:
        notes = [record.getMessage() for record in caplog.records if record.name == "absl"]
        assert notes == [f"the adapters {tmp_path} do not train: {told}"] * bool(told)
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(found)) == trained


@pytest.mark.parametrize("case", ["attention", "ranks"])
@pytest.mark.parametrize("saver", ["pipeline", "without_metadata", "peft", "peft_bin", "state"])
def test_other_ways_to_save(case, saver, params, tmp_path):
    model, want = adapted(case)
    if saver == "pipeline":
        HunyuanVideoLoraLoaderMixin.save_lora_weights(
            tmp_path,
            transformer_lora_layers=peft.get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
    elif saver.startswith("peft"):
        wrapped = randomise(
            peft.get_peft_model(copy.deepcopy(official.dit_oracle()), peft_config(case))
        )
        want = official.dit_oracle_output(wrapped)
        wrapped.save_pretrained(tmp_path, safe_serialization=saver == "peft")
    else:
        state = {name: value.contiguous() for name, value in model.state_dict().items()
                 if "lora_" in name}  # fmt: skip
        safetensors.torch.save_file(state, tmp_path / "any.safetensors")
        if saver == "state":
            settings = model.peft_config["default"].to_dict()
            settings["target_modules"] = sorted(settings["target_modules"])
            (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        else:  # diffusers takes alpha = rank then: the truth is its own reading
            model = copy.deepcopy(official.dit_oracle())
            model.load_lora_adapter(peft_state(adapted(case)[0]), prefix=None)
            want = official.dit_oracle_output(model)
    found, config = weights.load_adapters(tmp_path, official.DIT)
    same_outputs(params, found, config, want)


def peft_state(model):
    return {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}


def test_inside_the_model_and_gradients(params, tmp_path):
    """Adapters of every layer, unmerged: the same outputs, and gradients that reach all of them."""
    model, want = adapted("everything")
    model.save_lora_adapter(tmp_path)
    found, config = weights.load_adapters(tmp_path, official.DIT)
    paths = lora.adapted_paths(config, hunyuan_video)
    assert {"/".join(path) for path in paths} == set(hunyuan_video.ADAPTER_LAYERS)
    latents, timestep, condition = official._dit_inputs()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(given):
        out = hunyuan_video.velocity(
            params, latents, timestep, condition, official.DIT, given, config.scale
        )
        return jnp.sum((out - want) ** 2), out

    (loss, out), _ = run(found)
    np.testing.assert_allclose(out, want, rtol=0, atol=3e-5)
    assert loss < 1e-6
    shifted = jax.tree.map(lambda leaf: leaf * 1.1, found)
    _, gradients = run(shifted)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_every_dense_layer_has_a_name():
    shapes = traverse_util.flatten_dict(
        jax.eval_shape(lambda key: hunyuan_video.init_params(official.DIT, key), jax.random.key(0))
    )
    dense = {"/".join(path[:-1]) for path, leaf in shapes.items()
             if path[-1] == "kernel" and len(leaf.shape) == 2 + ("blocks" in path)}  # fmt: skip
    assert dense == set(hunyuan_video.ADAPTER_LAYERS)
    assert len(set(hunyuan_video.ADAPTER_LAYERS)) == len(hunyuan_video.ADAPTER_LAYERS)


def test_round_trip_through_our_formats(params, tmp_path):
    model, want = adapted("some_layers")
    model.save_lora_adapter(tmp_path / "theirs")
    found, config = weights.load_adapters(tmp_path / "theirs", official.DIT)
    for format in ("peft", "orbax"):
        weights.save_adapters(found, tmp_path / format, config, official.DIT, format)
        again, same = weights.load_adapters(tmp_path / format, official.DIT)
        assert same == config
        jax.tree.map(np.testing.assert_array_equal, again, found)
    model = copy.deepcopy(official.dit_oracle())
    model.load_lora_adapter(tmp_path / "peft", prefix="transformer", use_safetensors=True)
    np.testing.assert_allclose(official.dit_oracle_output(model), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", ["peft", "orbax"])
def test_nan_is_blamed_on_the_adapter(format, params, tmp_path):
    config = lora.LoraConfig(2, 2.0, ("query", "final/proj"))
    shapes = lora.abstract_adapters(params, config, hunyuan_video)
    found = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    found["blocks"]["text"]["query"]["down"][1, 2, 0] = np.nan
    weights.save_adapters(found, tmp_path / "lora", config, official.DIT, format)
    name = {
        "peft": r"transformer_blocks\.1\.attn\.add_q_proj\.lora_A\.weight",
        "orbax": "blocks/text/query/down, layer 1",
    }[format]
    with pytest.raises(ValueError, match=rf"adapters .*lora: tensor {name} holds NaN"):
        weights.load_adapters(tmp_path / "lora", official.DIT)


def test_ranges():
    assert adapters_lib.adapter_files._ranges((0, 2, 3, 4, 9)) == "0, 2-4, 9"
