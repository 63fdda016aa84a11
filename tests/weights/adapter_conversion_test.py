"""Conversions of adapters that peft trained, merged into their base; whose NaN it is."""

import io

import jax
import numpy as np
import official_layout as official
import peft
import pytest
import safetensors.torch
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from sage_grpo_jax import weights
from sage_grpo_jax.weights import conversion

FILE = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODULES = ["to_q", "to_v", "ff.net.2", "proj_out", "norm1.linear"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    official.dit_oracle().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """(folder of adapters of peft, what diffusers computes with them)."""
    model = HunyuanVideo15Transformer3DModel.from_pretrained(base)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=MODULES, rank_pattern={"to_v": 4},
        alpha_pattern={"proj_out": 1}, use_rslora=True,
    )  # fmt: skip
    model.add_adapter(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    path = tmp_path_factory.mktemp("adapters") / "lora"
    model.save_lora_adapter(path)
    return path, official.dit_oracle_output(model.eval())


def convert(src, base, dst, dst_format, stream=None):
    job = conversion.Job(src=src, src_format="peft", dst=dst, dst_format=dst_format, base=base)
    conversion.convert(job, stream)
    return dst


def test_merged_weights_compute_what_diffusers_computes(adapted, base, tmp_path):
    folder, want = adapted
    stream = io.StringIO()
    merged = convert(folder, base, tmp_path / "merged", "diffusers", stream)
    model = HunyuanVideo15Transformer3DModel.from_pretrained(merged).eval()
    assert np.abs(want - official.dit_oracle_output(official.dit_oracle())).max() > 0.1
    np.testing.assert_allclose(official.dit_oracle_output(model), want, rtol=0, atol=3e-5)
    notes = [line for line in stream.getvalue().splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: the adapters {folder} do not train: key, proj, mlp/in, blocks/text/query, "
        "blocks/text/value, blocks/text/mlp/out"
    ]


def test_adapters_stay_adapters(adapted, base, tmp_path):
    folder, want = adapted
    convert(folder, base, tmp_path / "peft", "peft")
    model = HunyuanVideo15Transformer3DModel.from_pretrained(base)
    model.load_lora_adapter(tmp_path / "peft", prefix="transformer", use_safetensors=True)
    np.testing.assert_allclose(official.dit_oracle_output(model.eval()), want, rtol=0, atol=3e-5)


def spoil(folder, file, name, value, target):
    """A copy of a folder with one value of one tensor replaced."""
    target.mkdir()
    for other in folder.iterdir():
        (target / other.name).write_bytes(other.read_bytes())
    with safetensors.safe_open(folder / file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    tensors[name].view(-1)[3] = value
    safetensors.torch.save_file(tensors, target / file, metadata)
    return target


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_whose_nan_it_is(adapted, base, value, tmp_path):
    name = "transformer_blocks.1.attn.to_q"
    bad = spoil(adapted[0], FILE, f"transformer.{name}.lora_B.weight", value, tmp_path / "lora")
    blamed = r"adapters .*/lora: tensor transformer_blocks\.1\.attn\.to_q\.lora_B\.weight holds NaN"
    for target in ("diffusers", "orbax", "peft"):
        with pytest.raises(ValueError, match=blamed):
            convert(bad, base, tmp_path / "out", target)
    worse = spoil(base, WEIGHTS, f"{name}.weight", value, tmp_path / "base")
    blamed = r"base .*/base: tensor transformer_blocks\.1\.attn\.to_q\.weight holds NaN"
    with pytest.raises(ValueError, match=blamed):
        convert(adapted[0], worse, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_a_product_that_overflows_is_told(adapted, base, tmp_path):
    """Both are finite; what comes of them is not."""
    name = "transformer.transformer_blocks.1.attn.to_q"
    one = spoil(adapted[0], FILE, f"{name}.lora_B.weight", 3e38, tmp_path / "one")
    both = spoil(one, FILE, f"{name}.lora_A.weight", 3e38, tmp_path / "both")
    blamed = r"base with adapters .*/both: tensor transformer_blocks\.1\.attn\.to_q\.weight holds"
    with pytest.raises(ValueError, match=blamed):
        convert(both, base, tmp_path / "out", "tencent")


def test_bfloat16_adapters(adapted, base, tmp_path):
    """As most are published: rounded there, exact from there on."""
    folder, _ = adapted
    with safetensors.safe_open(folder / FILE, "pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key).bfloat16() for key in opened.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, tmp_path / FILE, metadata)
    found, config = weights.load_adapters(tmp_path / FILE, official.DIT)
    whole, same = weights.load_adapters(folder, official.DIT)
    assert config == same
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=2**-8)
