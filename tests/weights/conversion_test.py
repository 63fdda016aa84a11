"""Conversions end to end: chains that come back bit for bit, other sources, refusals."""

import dataclasses
import filecmp
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import official_layout as official
import pytest
import safetensors.torch
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.weights import conversion

NARROW = HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    text_embed_dim=6,
    text_embed_2_dim=None,
    image_embed_dim=None,
    rope_axes_dim=(2, 2, 4),
)
VISION = dataclasses.replace(NARROW, image_embed_dim=5, use_meanflow=True)
CONFIGS = {"everything": official.DIT, "narrow": NARROW, "vision": VISION, "vae": official.VAE}
CHAIN = ("orbax", "diffusers", "orbax", "tencent")
CONFIG_JSON = "config.json"


def convert(src, src_format, dst, dst_format, **options):
    job = conversion.Job(pathlib.Path(src), src_format, pathlib.Path(dst), dst_format, **options)
    conversion.convert(job)


def random_params(config, seed=0):
    """Random values at every parameter of a DiT."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda key: hunyuan_video.init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)


def official_state(config):
    """A state dict in Tencent's layout, by the independent writer."""
    if config == official.VAE:
        return official.vae_to_official(official.vae_oracle().state_dict())
    if config == official.DIT:
        return official.dit_to_official(official.dit_oracle().state_dict())
    fields = json.loads(config.to_json())
    fields |= {"text_embed_2_dim": 6, "image_embed_dim": config.image_embed_dim or 5}
    torch.manual_seed(0)
    state = HunyuanVideo15Transformer3DModel.from_config(fields).state_dict()
    dropped = ("context_embedder_2.",)
    dropped += ("image_embedder.",) * (config.image_embed_dim is None)
    return official.dit_to_official({k: v for k, v in state.items() if not k.startswith(dropped)})


def official_json(config):
    if config == official.VAE:
        return official.VAE_JSON
    if config == official.DIT:
        return official.DIT_JSON
    return official.DIT_JSON | {
        "hidden_size": 16,
        "mm_double_blocks_depth": 2,
        "rope_dim_list": [2, 2, 4],
        "text_states_dim": 6,
        "glyph_byT5_v2": False,
        "use_meanflow": config.use_meanflow,
        "vision_projection": "none" if config.image_embed_dim is None else "linear",
    }


def write_official(folder, config, state=None):
    folder.mkdir()
    safetensors.torch.save_file(state or official_state(config), folder / official.FILE)
    (folder / CONFIG_JSON).write_text(json.dumps(official_json(config)))
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official") / "narrow", NARROW)


@pytest.mark.parametrize("name", CONFIGS)
def test_chain_comes_back_bit_for_bit(name, tmp_path):
    first = current = write_official(tmp_path / "0", CONFIGS[name])
    before = "tencent"
    for i, after in enumerate(CHAIN, start=1):
        convert(current, before, tmp_path / str(i), after, max_shard_size="1MB")
        current, before = tmp_path / str(i), after
    want = safetensors.torch.load_file(first / official.FILE)
    got = safetensors.torch.load_file(current / official.FILE)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[tensor], want[tensor]) for tensor in want)
    assert weights.load_config(current) == weights.load_config(first)
    once = conversion.Job(first, "tencent", tmp_path / "direct", "tencent")
    conversion.convert(once)
    assert filecmp.cmp(tmp_path / "direct" / official.FILE, current / official.FILE, shallow=False)


def test_diffusers_loads_shards_and_computes_the_same(tmp_path):
    source = write_official(tmp_path / "tencent", official.DIT)
    convert(source, "tencent", tmp_path / "out", "diffusers", max_shard_size="10MB")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 5
    assert (tmp_path / "out" / "diffusion_pytorch_model-00001-of-00005.safetensors") in shards
    index = json.loads((tmp_path / "out" / f"{official.FILE}.index.json").read_text())
    tensors = official.dit_oracle().state_dict()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    model = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out")
    params = weights.load(tmp_path / "out", official.DIT)
    want = official.dit_oracle_output(model.eval())
    np.testing.assert_allclose(official.dit_output(params), want, rtol=0, atol=2e-5)


def test_bfloat16_rounds_to_nearest_even(narrow, tmp_path):
    state = official_state(NARROW)
    # Halfway between two bfloat16 numbers, above an even and above an odd one.
    state["img_in.proj.bias"][:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    source = write_official(tmp_path / "source", NARROW, state)
    for format in ("diffusers", "orbax"):
        convert(source, "tencent", tmp_path / format, format, dtype="bfloat16")
        params = weights.load(tmp_path / format, NARROW, dtype=jnp.bfloat16)
        got = np.asarray(params["patch_embed"]["bias"].astype(np.float32))
        want = state["img_in.proj.bias"].bfloat16().float().numpy()
        np.testing.assert_array_equal(got, want)
        assert got[:2].tolist() == [1.0, 1 + 2**-6]
    on_disk = safetensors.torch.load_file(tmp_path / "diffusers" / official.FILE)
    assert {tensor.dtype for tensor in on_disk.values()} == {torch.bfloat16}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_training_checkpoints(suffix, narrow, tmp_path):
    module = official_state(NARROW)
    ema = {name: tensor + 1 for name, tensor in module.items()}
    file = tmp_path / f"checkpoint{suffix}"

    def save(**parts):
        if suffix == ".pt":
            extra = {"step": 7, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 0.1}}
            torch.save(parts | extra, file)
        else:
            flat = {f"{key}.{n}": t for key, state in parts.items() for n, t in state.items()}
            safetensors.torch.save_file(flat, file)

    def converted(**options):
        convert(file, "tencent", tmp_path / "out", "tencent", config_json=narrow / CONFIG_JSON,
                overwrite=True, **options)  # fmt: skip
        return safetensors.torch.load_file(tmp_path / "out" / official.FILE)["img_in.proj.bias"]

    save(module=module)
    assert torch.equal(converted(), module["img_in.proj.bias"])
    save(ema=ema)
    assert torch.equal(converted(), ema["img_in.proj.bias"])
    with pytest.raises(ValueError, match=r"src_key='module': .* no such key, only \['ema'\]"):
        converted(src_key="module")
    save(module=module, ema=ema)
    with pytest.raises(ValueError, match="both module and ema: choose with --src_key"):
        converted()
    assert torch.equal(converted(src_key="module"), module["img_in.proj.bias"])
    assert torch.equal(converted(src_key="ema"), ema["img_in.proj.bias"])


def test_config_is_inferred_where_the_tensors_determine_it(tmp_path):
    """Released head width: heads and rope axes are known; other widths are refused."""
    config = dataclasses.replace(
        NARROW, attention_head_dim=128, num_attention_heads=1, rope_axes_dim=(16, 56, 56)
    )
    weights.save(random_params(config), tmp_path / "full", "tencent", config=config)
    (tmp_path / "full" / CONFIG_JSON).unlink()
    convert(tmp_path / "full", "tencent", tmp_path / "out", "diffusers")
    assert weights.load_config(tmp_path / "out") == config

    source = write_official(tmp_path / "narrow", NARROW)
    (source / CONFIG_JSON).unlink()
    with pytest.raises(ValueError, match=r"rope_axes_dim is not in the tensors.*--config_json"):
        convert(source, "tencent", tmp_path / "no", "diffusers")
    (tmp_path / "given.json").write_text(NARROW.to_json())
    convert(source, "tencent", tmp_path / "yes", "orbax", config_json=tmp_path / "given.json")
    assert weights.load_config(tmp_path / "yes") == NARROW
    assert not (tmp_path / "no").exists()


CHANGES = {
    "num_layers": ({"mm_double_blocks_depth": 3}, r"num_layers=3, the tensors say 2 \(double_bl"),
    "widths": ({"hidden_size": 32, "rope_dim_list": [4, 6, 6]}, r"attention_head_dim=16.* say 8"),
    "meanflow": ({"use_meanflow": True}, r"use_meanflow=True, the tensors say False \(time_r_in"),
    "byt5": ({"glyph_byT5_v2": True}, r"text_embed_2_dim=1472, the tensors say None \(byt5_in"),
    "vision": ({"vision_projection": "linear"}, r"image_embed_dim=5, .* None \(vision_in"),
    "patch": ({"patch_size": [1, 2, 2]}, r"patch_size=2, the tensors say 1 \(img_in.proj.weight"),
    "channels": ({"concat_condition": False}, r"in_channels=4, the tensors say 9 \(img_in"),
    "text": ({"text_states_dim": 3584}, r"text_embed_dim=3584, .* 6 \(txt_in.input_embedder"),
    "mlp": (
        {"mlp_width_ratio": 2},
        r"mlp_ratio=2.0, the tensors say 4.0 \(double_blocks.0.img_mlp",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_config_that_does_not_fit_the_tensors(name, narrow, tmp_path):
    change, message = CHANGES[name]
    (tmp_path / "c.json").write_text(json.dumps(official_json(NARROW) | change))
    with pytest.raises(ValueError, match=f"c.json does not fit the tensors: .*{message}"):
        convert(narrow, "tencent", tmp_path / "o", "orbax", config_json=tmp_path / "c.json")
    assert not (tmp_path / "o").exists()


def test_step_distilled_weights_against_another_variants_config(tmp_path):
    source = write_official(tmp_path / "distilled", VISION)
    (source / CONFIG_JSON).write_text(json.dumps(official_json(VISION) | {"use_meanflow": False}))
    message = r"use_meanflow=False, the tensors say True \(time_r_in\.mlp\.0\.weight\)"
    with pytest.raises(ValueError, match=message):
        convert(source, "tencent", tmp_path / "out", "diffusers")
    (tmp_path / "config.json").write_text(json.dumps(official_json(VISION)))
    options = {"config_json": tmp_path / "config.json"}
    convert(source, "tencent", tmp_path / "out", "diffusers", **options)
    (tmp_path / "out" / CONFIG_JSON).write_text(
        dataclasses.replace(VISION, use_meanflow=False).to_json()
    )
    message = r"use_meanflow=False.*time_embed\.timestep_embedder_r\.linear_1\.weight"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "out", "diffusers", tmp_path / "again", "orbax")


def test_another_models_weights(narrow, tmp_path):
    vae = write_official(tmp_path / "vae", official.VAE)
    with pytest.raises(ValueError, match=r"weights of a HunyuanVideo-1.5 VAE, .* that of a .* DiT"):
        convert(vae, "tencent", tmp_path / "o", "orbax", config_json=narrow / CONFIG_JSON)
    with pytest.raises(ValueError, match="are in the tencent layout, not in the diffusers layout"):
        convert(narrow, "diffusers", tmp_path / "o", "orbax")
    (tmp_path / "c.json").write_text(
        dataclasses.replace(official.VAE, layers_per_block=2, latent_channels=8).to_json()
    )
    message = r"latent_channels=8, .* 4 \(decoder.conv_in.*layers_per_block=2, the tensors say 1"
    with pytest.raises(ValueError, match=message):
        convert(vae, "tencent", tmp_path / "o", "orbax", config_json=tmp_path / "c.json")
    state = official_state(NARROW) | {"double_blocks.0.extra": torch.ones(2)}
    del state["txt_in.individual_token_refiner.blocks.1.self_attn_qkv.bias"]
    source = write_official(tmp_path / "odd", NARROW, state)
    message = (
        r"missing: txt_in.*blocks\.1\.self_attn_qkv\.bias; unexpected: double_blocks\.0\.extra"
    )
    with pytest.raises(ValueError, match=message):
        convert(source, "tencent", tmp_path / "o", "orbax")
    state = official_state(NARROW)
    state["txt_in.individual_token_refiner.blocks.1.self_attn_qkv.bias"] = torch.ones(16)
    source = write_official(tmp_path / "thin", NARROW, state)
    with pytest.raises(ValueError, match=r"self_attn_qkv\.bias: \(16,\) instead of \(48,\)"):
        convert(source, "tencent", tmp_path / "o", "orbax")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.float32),
        (float("nan"), torch.bfloat16),
        (float("-inf"), torch.bfloat16),
        (float("-inf"), torch.float16),
    ],
)
def test_values_that_are_not_finite(value, dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in official_state(NARROW).items()}
    state["double_blocks.1.txt_mlp.fc1.weight"][3, 2] = value
    source = write_official(tmp_path / "source", NARROW, state)
    message = r"tensor double_blocks\.1\.txt_mlp\.fc1\.weight holds NaN or infinite values"
    for format in ("orbax", "diffusers"):
        with pytest.raises(ValueError, match=message):
            convert(source, "tencent", tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_values_that_overflow(tmp_path):
    state = official_state(NARROW)
    state["double_blocks.1.txt_mlp.fc1.weight"][3, 2] = 3.4e38
    source = write_official(tmp_path / "source", NARROW, state)
    for format, name in (("orbax", "blocks/text/mlp/in/kernel"), ("diffusers", "transformer_bl")):
        with pytest.raises(ValueError, match=f"tensor {name}.*: not every value .* in bfloat16"):
            convert(source, "tencent", tmp_path / "out", format, dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_bad_jobs(narrow, tmp_path):
    for options, message in (
        ({"dtype": "int8"}, "dtype='int8': must be one of"),
        ({"max_shard_size": "big"}, "max_shard_size='big': must be a size such as 10GB"),
        ({"src_key": "model"}, "src_key='model': must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(narrow, "tencent", tmp_path / "o", "diffusers", **options)
    with pytest.raises(ValueError, match="dst_format='gguf': must be one of"):
        convert(narrow, "tencent", tmp_path / "o", "gguf")
    with pytest.raises(ValueError, match="no such file or folder"):
        convert(tmp_path / "gone", "tencent", tmp_path / "o", "orbax")
    with pytest.raises(ValueError, match="holds a whole model, no adapters"):
        convert(narrow, "tencent", tmp_path / "o", "peft")
    for target in (narrow, narrow.parent):
        with pytest.raises(ValueError, match="must not be src, nor hold it"):
            convert(narrow, "tencent", target, "orbax", overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"exists already; --overwrite \(overwrite=True\)"):
        convert(narrow, "tencent", tmp_path / "full", "orbax")
    # A config.json beside it does not make it ours; what the command wrote itself is replaced.
    for name in ("mine.txt", CONFIG_JSON):
        (tmp_path / "full" / name).write_text("{}")
        with pytest.raises(ValueError, match=r"full: holds .*mine.txt and no .*it is not replaced"):
            convert(narrow, "tencent", tmp_path / "full", "orbax", overwrite=True)
    for format in ("orbax", "diffusers"):
        convert(narrow, "tencent", tmp_path / "ours", format, overwrite=True)
        assert weights.load_config(tmp_path / "ours") == NARROW
