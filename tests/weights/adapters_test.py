"""Adapters: diffusers computes the same with ours, we with diffusers'; files that do not fit."""

import copy
import dataclasses
import json

import jax
import numpy as np
import official_layout as official
import peft
import pytest
import safetensors.torch
import torch
from diffusers.loaders import HunyuanVideoLoraLoaderMixin

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video, lora
from sage_grpo_jax.models.lora import LoraConfig

FILE = "pytorch_lora_weights.safetensors"
LORA = LoraConfig(rank=3, alpha=7.5)
PART = LoraConfig(rank=2, alpha=2.0, targets=("query", "mlp/out"))
# Written down here once more: the layers that diffusers adapts for each target, image and text.
MODULES = {
    "query": ("attn.to_q", "attn.add_q_proj"),
    "key": ("attn.to_k", "attn.add_k_proj"),
    "value": ("attn.to_v", "attn.add_v_proj"),
    "proj": ("attn.to_out.0", "attn.to_add_out"),
    "mlp/in": ("ff.net.0.proj", "ff_context.net.0.proj"),
    "mlp/out": ("ff.net.2", "ff_context.net.2"),
}


def modules(config):
    return [f"transformer_blocks.{i}.{name}" for target in config.targets
            for name in MODULES[target] for i in range(official.DIT.num_layers)]  # fmt: skip


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    official.dit_oracle().save_pretrained(path)
    return weights.load(path, official.DIT)


def random_adapters(config, seed=0):
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(
        lambda key: hunyuan_video.init_params(official.DIT, key), jax.random.key(0)
    )
    shapes = lora.abstract_adapters(abstract, config, hunyuan_video)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


def adapted_oracle(config):
    """diffusers' model with random adapters of its own making."""
    model = copy.deepcopy(official.dit_oracle())
    model.add_adapter(
        peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules(config))
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def same_outputs(model, params, adapters, config):
    merged = lora.merge(params, adapters, config.scale)
    want = official.dit_oracle_output(model)
    plain = official.dit_oracle_output(official.dit_oracle())
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(official.dit_output(merged), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", [LORA, PART], ids=["all", "part"])
def test_diffusers_loads_ours_and_computes_the_same(config, params, tmp_path):
    adapters = random_adapters(config)
    weights.save_adapters(adapters, tmp_path / "lora", config, official.DIT)
    model = copy.deepcopy(official.dit_oracle())
    model.load_lora_adapter(
        tmp_path / "lora", prefix="transformer", use_safetensors=True, adapter_name="a"
    )
    settings = model.peft_config["a"]
    assert (settings.r, settings.lora_alpha) == (config.rank, config.alpha)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(modules(config))
    same_outputs(model, params, adapters, config)

    again, found = weights.load_adapters(tmp_path / "lora", official.DIT)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


@pytest.mark.parametrize("saver", ["model", "pipeline", "alpha_tensors", "plain"])
def test_we_load_what_diffusers_saves(saver, params, tmp_path):
    config = dataclasses.replace(LORA, alpha=3.0) if saver == "plain" else LORA
    model = adapted_oracle(config)
    state = peft.get_peft_model_state_dict(model)
    if saver == "model":
        model.save_lora_adapter(tmp_path)
    elif saver == "pipeline":
        HunyuanVideoLoraLoaderMixin.save_lora_weights(
            tmp_path,
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
    else:
        tensors = {f"transformer.{name}": tensor.contiguous() for name, tensor in state.items()}
        if saver == "alpha_tensors":
            tensors |= {f"transformer.{name}.alpha": torch.tensor(7.5) for name in modules(LORA)}
        safetensors.torch.save_file(tensors, tmp_path / FILE)
    adapters, found = weights.load_adapters(tmp_path, official.DIT)
    assert found == config
    same_outputs(model, params, adapters, config)


def test_we_load_what_peft_saves(tmp_path):
    model = adapted_oracle(PART)
    state = {f"base_model.model.{k}": v for k, v in peft.get_peft_model_state_dict(model).items()}
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    _, found = weights.load_adapters(tmp_path, official.DIT)
    assert found == PART


def test_orbax_form_onto_a_mesh(tmp_path):
    adapters = random_adapters(LORA)
    weights.save_adapters(adapters, tmp_path / "lora", LORA, official.DIT, format="orbax")
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(
        lambda leaf: jax.NamedSharding(mesh, jax.P(None, *(["fsdp", None] * (leaf.shape[1] > 3)))),
        adapters,
    )
    found, config = weights.load_adapters(tmp_path / "lora", official.DIT, shardings)
    assert config == LORA
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
    assert weights.load_config(tmp_path / "lora") == dataclasses.replace(official.DIT, remat=True)


@pytest.fixture
def tensors(tmp_path):
    weights.save_adapters(random_adapters(PART), tmp_path / "good", PART, official.DIT)
    return safetensors.torch.load_file(tmp_path / "good" / FILE)


def refused(tmp_path, tensors, message, settings=None):
    metadata = None
    if settings:
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    safetensors.torch.save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{message}"):
        weights.load_adapters(tmp_path / "bad.safetensors", official.DIT)


def test_layers_that_do_not_fit(tensors, tmp_path):
    block = "transformer.transformer_blocks"
    query = f"{block}.1.attn.to_q.lora_A.weight"
    for change, message in (
        ({f"{block}.0.norm1.linear.lora_A.weight": torch.ones(2, 32)}, r"missing: .*norm1.*lora_B"),
        ({f"{block}.0.norm1.linear.weight": torch.ones(2, 32)}, r"unexpected: .*norm1\.linear"),
        (
            {"transformer.x_embedder.proj.lora_A.weight": torch.ones(2, 9, 1, 1, 1)},
            "unexpected: x_",
        ),
        ({f"{block}.7.attn.to_q.lora_A.weight": torch.ones(2, 32)}, r"unexpected: .*blocks\.7\.a"),
        ({"transformer.proj_out.lora_B.weight": torch.ones(4, 2)}, r"missing: proj_out\.lora_A"),
        (
            {query: torch.ones(3, 32)},
            r"to_q\.lora_B\.weight: \(32, 2\) instead of \(32, 3\)",
        ),
        ({query: torch.ones(33, 32)}, r"to_q\.lora_A\.weight: rank 33: must be 1 to 32"),
        ({query: torch.ones(())}, r"to_q\.lora_A\.weight: rank 0: must be"),
        ({query.replace("transformer.", "base_model.model.", 1): torch.ones(2, 32)}, "there twice"),
        ({query: torch.ones(2, 31)}, r"to_q\.lora_A\.weight: \(2, 31\) instead of \(2, 32\)"),
        ({query: torch.ones(2, 32).int()}, r"to_q\.lora_A\.weight is int32"),
    ):
        refused(tmp_path, tensors | change, message)
    less = {name: tensor for name, tensor in tensors.items() if name != query}
    refused(tmp_path, less, r"missing: transformer_blocks\.1\.attn\.to_q\.lora_A\.weight")
    refused(tmp_path, {"lora_unet.up": torch.ones(2)}, "no adapters of this model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, r"r=5 in the metadata.* rank 2"),
        ({"lora_alpha": None}, "lora_alpha is missing in the metadata"),
        ({"lora_alpha": [4]}, r"lora_alpha=\[4\]: must be a finite number or null"),
        ({"lora_alpha": 10**400}, "lora_alpha=an integer of 1329 bits: must be a finite number"),
        ({"lora_alpha": 0}, "alpha of .*: 0: must be greater than 0"),
        ({"r": "2"}, "r='2': must be an integer"),
        ({"use_dora": True}, r"\{'use_dora': True\}: only plain"),
        ({"init_lora_weights": "pissa"}, "pissa.*only plain"),
        ({"peft_type": "LOHA"}, "LOHA.*only plain"),
        ({"use_rslora": "yes"}, "use_rslora='yes': must be true or false"),
        ({"alpha_pattern": 3}, "alpha_pattern=3: must be an object"),
        ({"alpha_pattern": {"(a+)+": 3}}, "regular expressions are not supported"),
        ({"rank_pattern": {"to_q": 4}}, r"r=4 in the metadata, the tensors of .*to_q have rank 2"),
    ],
)
def test_settings_that_do_not_fit(settings, message, tensors, tmp_path):
    good = {"r": 2, "lora_alpha": 2}
    refused(
        tmp_path, tensors, message, {f"transformer.{k}": v for k, v in (good | settings).items()}
    )


def test_metadata_of_another_form(tensors, tmp_path):
    refused(tmp_path, tensors, "lora_alpha is missing", {"r": 2})
    for text in ("[]", "null", "3", "{", '{"r": 2, "r": 3}', '{"lora_alpha": NaN}', "[" * 10**5):
        safetensors.torch.save_file(tensors, tmp_path / "bad", {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match="bad: lora_adapter_metadata: not"):
            weights.load_adapters(tmp_path / "bad", official.DIT)


def test_alphas_that_do_not_fit(tensors, tmp_path):
    every = {f"transformer.{name}.alpha": torch.tensor(3.0) for name in modules(PART)}
    first = next(iter(every))
    settings = {"transformer.r": 2, "transformer.lora_alpha": 3.0}
    safetensors.torch.save_file(tensors | every, tmp_path / "good.safetensors")
    _, found = weights.load_adapters(tmp_path / "good.safetensors", official.DIT)
    assert found == dataclasses.replace(PART, alpha=3.0)
    some = {name: value for name, value in every.items() if name != first}
    refused(tmp_path, tensors | some, "alpha is missing, other layers have theirs")
    other = every | {first: torch.tensor(4.0)}
    refused(tmp_path, tensors | other, "alphas differ: .*4.0, metadata: 3.0", settings)
    for wrong in (torch.ones(2), torch.tensor(True), torch.tensor(float("nan"))):
        refused(tmp_path, tensors | every | {first: wrong}, "alpha")


def test_saving_refuses_what_does_not_fit(tmp_path):
    adapters = random_adapters(PART)
    with pytest.raises(ValueError, match="format='gguf'"):
        weights.save_adapters(adapters, tmp_path / "a", PART, official.DIT, "gguf")
    with pytest.raises(ValueError, match=r"missing: blocks/image/key/down"):
        weights.save_adapters(adapters, tmp_path / "a", LORA, official.DIT)
    other = dataclasses.replace(PART, rank=5)
    with pytest.raises(ValueError, match=r"of another shape: .*blocks/image/query/down"):
        weights.save_adapters(adapters, tmp_path / "a", other, official.DIT)
    assert not list(tmp_path.iterdir())
