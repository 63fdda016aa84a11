"""`convert` of a second model: diffusers' folders bit for bit, Wan's own layout, adapters."""

import dataclasses
import functools
import json
import signal

import jax
import numpy as np
import peft
import pytest
import torch
import wan_pair
from absl.testing import flagsaver
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from wan_oracle import make_inputs, oracle_output

from sage_grpo_jax import convert, weights
from sage_grpo_jax.common import command_line
from sage_grpo_jax.models import lora, wan
from sage_grpo_jax.models.wan import WanConfig
from sage_grpo_jax.models.wan_vae import WanVaeConfig
from sage_grpo_jax.weights import configs, layouts
from sage_grpo_jax.weights.formats import tensor_files

INPUTS = make_inputs(wan_pair.TRANSFORMER, (2, 4, 2), (3, 7))
MODELS = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}
CONFIGS = {
    "1.3B": WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "14B": WanConfig(),
    "no_cross_norm": WanConfig(cross_attn_norm=False, num_layers=2, patch_size=(2, 1, 3)),
    "vae": WanVaeConfig(),
}
# config.json of Wan-AI/Wan2.1-T2V-1.3B.
OFFICIAL = """{"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536,
 "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16, "model_type": "t2v",
 "num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512}"""


def run(**flags):
    """The command in this process; its exit code, or 0."""
    before = signal.getsignal(signal.SIGTERM)
    with flagsaver.flagsaver():
        try:
            argv = ["convert", *(f"--{name}={value}" for name, value in flags.items())]
            command_line.parse_flags(argv)
            command_line.call(convert.main)
        except SystemExit as stop:
            return stop.code
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Sharded, as diffusers writes large models."""
    return wan_pair.make_pair(tmp_path_factory.mktemp("wan"), max_shard_size="20KB")


def assert_same_model(folder, want):
    """diffusers reads it, and finds the same config and the same bits."""
    model = type(want).from_pretrained(folder)
    found, state = model.state_dict(), want.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    fields, ours = (json.loads(m.to_json_string()) for m in (want, model))
    for name, value in fields.items():
        if not name.startswith(("_", "scale_factor")):
            assert ours[name] == value, name


@pytest.mark.parametrize("name", MODELS)
def test_from_diffusers_and_back_bit_for_bit(pair, name, tmp_path):
    source, want = pair.path / name, getattr(pair, name)
    assert len([*source.glob("*.safetensors")]) > 1
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert run(src=source, src_format="diffusers", dst=ours, dst_format="orbax") == 0
    flags = {"src_format": "orbax", "dst_format": "diffusers", "max_shard_size": "30KB"}
    assert run(src=ours, dst=back, **flags) == 0
    assert len([*back.glob("*.safetensors")]) > 1
    assert_same_model(back, want)


def test_the_vae_through_the_layout_of_its_authors(pair, tmp_path, capsys):
    """A file of torch.save without config.json, as theirs is."""
    flags = {"src": pair.path / "vae", "src_format": "diffusers"}
    assert run(**flags, dst=tmp_path / "theirs", dst_format="original") == 0
    tensors = tensor_files.open_tensors(tmp_path / "theirs", None)
    assert "decoder.head.0.gamma" in tensors
    file = tmp_path / "vae.pth"
    torch.save({name: torch.tensor(tensor.read()) for name, tensor in tensors.items()}, file)
    flags = {"src": file, "src_format": "original", "dst": tmp_path / "back"}
    assert run(**flags, dst_format="diffusers") == 2
    assert "latents_mean is not in the tensors" in capsys.readouterr().err
    flags["config_json"] = pair.path / "vae" / "config.json"
    assert run(**flags, dst_format="diffusers") == 0
    assert_same_model(tmp_path / "back", pair.vae)


def test_layouts_of_other_models_are_refused(pair, tmp_path, capsys):
    flags = {"src": pair.path / "transformer", "src_format": "diffusers", "dst": tmp_path / "out"}
    assert run(**flags, dst_format="tencent") == 2
    assert "must be one of ['diffusers', 'original'] for a Wan 2.1 DiT" in capsys.readouterr().err
    flags["config_json"] = pair.path / "vae" / "config.json"
    assert run(**flags, dst_format="orbax") == 2
    assert "the weights of a Wan 2.1 DiT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Adapters


@pytest.fixture(scope="module")
def adapted(pair, tmp_path_factory):
    """(folder of adapters of peft, what diffusers computes with them)."""
    model = WanTransformer3DModel.from_pretrained(pair.path / "transformer")
    layers = ["to_q", "attn2.to_v", "ffn.net.2", "time_proj", "proj_out", "text_embedder.linear_1"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    path = tmp_path_factory.mktemp("adapters") / "lora"
    model.save_lora_adapter(path)
    return path, output(model.eval())


def output(model):
    return oracle_output(model, *INPUTS)


def test_merged_adapters_compute_what_diffusers_computes(pair, adapted, tmp_path):
    folder, want = adapted
    flags = {"src": folder, "src_format": "peft", "base": pair.path / "transformer"}
    assert run(**flags, dst=tmp_path / "merged", dst_format="diffusers") == 0
    got = output(WanTransformer3DModel.from_pretrained(tmp_path / "merged").eval())
    assert np.abs(want - output(pair.transformer)).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)


def test_adapters_through_our_format_are_those_of_diffusers(pair, adapted, tmp_path):
    folder, want = adapted
    config = pair.path / "transformer" / "config.json"
    flags = {"src": folder, "src_format": "peft", "config_json": config}
    assert run(**flags, dst=tmp_path / "ours", dst_format="orbax") == 0
    flags = {"src": tmp_path / "ours", "src_format": "orbax", "dst": tmp_path / "peft"}
    assert run(**flags, dst_format="peft") == 0
    model = WanTransformer3DModel.from_pretrained(pair.path / "transformer")
    model.load_lora_adapter(tmp_path / "peft", prefix="transformer", use_safetensors=True)
    np.testing.assert_allclose(output(model.eval()), want, rtol=0, atol=3e-5)


def test_what_we_train_diffusers_computes(pair, tmp_path):
    """Adapters that were made here: ours, in diffusers, and back with the same bits."""
    params = weights.load(pair.path / "transformer", wan_pair.TRANSFORMER)
    chosen = lora.LoraConfig(2, 3.0, ("query", "mlp/in", "time_embed/out"))
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32),
        lora.abstract_adapters(params, chosen, wan),
    )
    weights.save_adapters(adapters, tmp_path / "ours", chosen, wan_pair.TRANSFORMER)
    model = WanTransformer3DModel.from_pretrained(pair.path / "transformer")
    named = {"prefix": "transformer", "adapter_name": "default"}
    model.load_lora_adapter(tmp_path / "ours", use_safetensors=True, **named)
    velocity = jax.jit(wan.velocity, static_argnums=4)
    got = velocity(params, *INPUTS, wan_pair.TRANSFORMER, adapters, chosen.scale)
    np.testing.assert_allclose(got, output(model.eval()), rtol=0, atol=3e-5)
    assert np.abs(got - output(pair.transformer)).max() > 1e-2

    model.save_lora_adapter(tmp_path / "theirs")
    back, found = weights.load_adapters(tmp_path / "theirs", wan_pair.TRANSFORMER)
    assert (found.scale, set(found.targets)) == (1.5, set(chosen.targets))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, back), adapters)


# Configs


@functools.cache
def shapes(config, layout):
    rows, parameters = layouts.key_table(config, layout)
    return {name: row.shape_there(parameters[row.ours]) for row in rows for name in row.names()}


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", ["1.3B", "14B", "vae"])
def test_released_models_need_no_config(name, layout):
    assert configs.infer_config(layout, shapes(CONFIGS[name], layout)) == CONFIGS[name]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_field_is_compared_with_the_tensors(name, layout):
    config = CONFIGS[name]
    tensors = shapes(config, layout)
    configs.check_config(config, layout, tensors)
    other = {
        "num_layers": 7,
        "ffn_dim": 64,
        "freq_dim": 64,
        "text_dim": 64,
        "patch_size": (3, 2, 2),
        "num_attention_heads": 6,
        "cross_attn_norm": not getattr(config, "cross_attn_norm", True),
        "base_dim": 48,
        "dim_mult": (1, 2, 4, 5),
        "num_res_blocks": 1,
        "temperal_downsample": (True, True, True),
    }
    tried = {field: value for field, value in other.items() if hasattr(config, field)}
    assert len(tried) >= 4
    for field, value in tried.items():
        shown = "hidden_size" if field == "num_attention_heads" else field
        with pytest.raises(ValueError, match=rf"{shown}=.*, the tensors say"):
            configs.check_config(dataclasses.replace(config, **{field: value}), layout, tensors)


def test_what_cannot_be_inferred():
    with pytest.raises(ValueError, match=r"num_attention_heads .* \[1536, 5120\], not for 24 \("):
        configs.infer_config("original", shapes(wan_pair.TRANSFORMER, "original"))
    with pytest.raises(ValueError, match=r"latents_mean is not in the tensors"):
        configs.infer_config("diffusers", shapes(wan_pair.VAE, "diffusers"))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("config", [CONFIGS["1.3B"], wan_pair.TRANSFORMER, wan_pair.VAE])
def test_one_missing_tensor_is_that_and_nothing_else(config, layout):
    whole = shapes(config, layout)
    names = sorted(whole)
    for name in names[:: max(1, len(names) // 40)]:
        part = {other: shape for other, shape in whole.items() if other != name}
        if layouts.recognise(part) is not None:
            configs.check_config(config, layout, part)


def test_config_json_of_the_authors(tmp_path):
    (tmp_path / "config.json").write_text(OFFICIAL)
    config = weights.load_config(tmp_path)
    assert config == CONFIGS["1.3B"]
    back, want = json.loads(configs.to_json(config, "original")), json.loads(OFFICIAL)
    assert back == {name: value for name, value in want.items() if name != "_diffusers_version"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "i2v"}, "model_type=i2v: must be t2v"),
        ({"text_len": 226}, "text_len=226: must be 512"),
        ({"num_heads": 7}, "dim=1536: must be a multiple of num_heads=7"),
        ({"window": 3}, r"fields=.*window.*: must be only"),
        ({"ffn_dim": "wide"}, "ffn_dim"),
    ],
)
def test_other_models_of_the_authors(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(OFFICIAL) | change))
    with pytest.raises(ValueError, match=message):
        weights.load_config(tmp_path)


def test_what_their_config_json_cannot_say():
    with pytest.raises(ValueError, match="text_dim=10: must be 4096 in the official layout"):
        configs.to_json(wan_pair.TRANSFORMER, "original")
