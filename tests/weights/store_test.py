"""Model folders: exchange with diffusers, shards, dtypes, devices, damage."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import official_layout
import pytest
import safetensors.torch
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video

CONFIG = dataclasses.replace(official_layout.DIT, text_embed_2_dim=6, remat=True)
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel.from_config(json.loads(CONFIG.to_json()))


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def params(folder):
    return weights.load(folder, CONFIG)


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_same_tensors(model, oracle):
    want = dict(oracle.state_dict())
    got = dict(model.state_dict())
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_diffusers_reads_what_we_save(oracle, params, tmp_path):
    weights.save(params, tmp_path / "out", config=CONFIG)
    again = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "out")
    assert_same_tensors(again, oracle)
    assert weights.load_config(tmp_path / "out") == CONFIG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_shards_single_file_and_their_config(oracle, folder, params, tmp_path):
    oracle.save_pretrained(tmp_path, max_shard_size="10MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_trees_equal(weights.load(tmp_path, weights.load_config(tmp_path)), params)
    assert_trees_equal(weights.load(folder / NAME, weights.load_config(folder / NAME)), params)


def test_bfloat16_files_load_as_float32_and_back(oracle, params, tmp_path):
    weights.save(params, tmp_path / "half", config=CONFIG, dtype=jnp.bfloat16)
    on_disk = safetensors.torch.load_file(tmp_path / "half" / NAME)
    assert torch.equal(on_disk["proj_out.weight"], oracle.proj_out.weight.detach().bfloat16())
    loaded = weights.load(tmp_path / "half", CONFIG)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_trees_equal(loaded, rounded)


def test_shardings_place_every_slice(folder, params):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "context"), axis_types=auto)

    def sharding(value, names):
        spec = [("fsdp", "context") if name == "embed" else None for name in names]
        if names[0] == "layers" and value.shape[0] == 2:
            spec[0] = "fsdp" if "embed" not in names else None
        return jax.NamedSharding(mesh, jax.P(*spec))

    shardings = jax.tree.map(sharding, params, hunyuan_video.partition_names(CONFIG))
    loaded = weights.load(folder, CONFIG, shardings)
    assert_trees_equal(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


def test_model_without_optional_parts_round_trips(tmp_path):
    config = dataclasses.replace(CONFIG, text_embed_2_dim=None, image_embed_dim=None)
    abstract = jax.eval_shape(lambda key: hunyuan_video.init_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), abstract)
    weights.save(params, tmp_path / "out", config=config)
    assert weights.load_config(tmp_path / "out") == config
    assert_trees_equal(weights.load(tmp_path / "out", config), params)


def test_save_replaces_a_folder_whole_or_not_at_all(params, tmp_path):
    weights.save(params, tmp_path / "out", config=CONFIG)
    before = (tmp_path / "out" / NAME).read_bytes()
    broken = {**params, "final": {**params["final"], "proj": Unreadable.tree(params)}}
    with pytest.raises(ValueError, match=r"out: exists already; .*overwrite=True"):
        weights.save(params, tmp_path / "out", config=CONFIG)
    with pytest.raises(OSError, match="device lost"):
        weights.save(broken, tmp_path / "out", config=CONFIG, overwrite=True)
    assert (tmp_path / "out" / NAME).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    zeros = jax.tree.map(jnp.zeros_like, params)
    weights.save(zeros, tmp_path / "out", config=CONFIG, overwrite=True)
    assert not np.any(weights.load(tmp_path / "out", CONFIG)["final"]["proj"]["kernel"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_save_replaces_only_what_it_wrote(params, tmp_path):
    """A model that somebody else wrote, and one of ours with notes beside it."""
    out, notes = tmp_path / "out", tmp_path / "out" / "notes.txt"
    weights.save(params, out, config=CONFIG)
    text = (out / "sage_grpo_jax_manifest.json").read_bytes()

    def assert_refused(named):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=f"holds .*{named}.* it is not replaced"):
            weights.save(params, out, config=CONFIG, overwrite=True)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    notes.write_text("mine")
    assert_refused("notes.txt, which this program did not write")
    notes.unlink()
    (out / "sage_grpo_jax_manifest.json").unlink()
    assert_refused("config.json")
    (out / "sage_grpo_jax_manifest.json").write_bytes(text)
    weights.save(params, out, config=CONFIG, overwrite=True)


class Unreadable:
    """An array whose values are gone when they are asked for."""

    def __init__(self, shape):
        self.shape = shape

    def __array__(self, *args, **kwargs):
        raise OSError("device lost")

    @classmethod
    def tree(cls, params):
        return {name: cls(value.shape) for name, value in params["final"]["proj"].items()}


def test_save_refuses_what_does_not_fit(params, tmp_path):
    with pytest.raises(ValueError, match="format='gguf'"):
        weights.save(params, tmp_path / "a", "gguf", config=CONFIG)
    rest = {name: value for name, value in params.items() if name != "cond_type_embed"}
    with pytest.raises(ValueError, match="missing: cond_type_embed"):
        weights.save(rest, tmp_path / "a", config=CONFIG)
    with pytest.raises(ValueError, match=r"cond_type_embed: \(1,\) instead of \(3, 32\)"):
        weights.save({**params, "cond_type_embed": jnp.ones(1)}, tmp_path / "a", config=CONFIG)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder"):
        weights.save(params, tmp_path / "file", config=CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_load_names_missing_and_unexpected_tensors(oracle, tmp_path):
    tensors = {name: value.clone() for name, value in oracle.state_dict().items()}
    tensors["proj_out.scale"] = tensors.pop("proj_out.bias")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: proj_out\.bias; unexpected: proj_out\.scale"):
        weights.load(tmp_path, CONFIG)


def test_unreadable_folders(folder, tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        weights.load(tmp_path / "nowhere", CONFIG)
    with pytest.raises(ValueError, match="must hold one"):
        weights.load(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"no .*config\.json"):
        weights.load_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / NAME).read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        weights.load(tmp_path, CONFIG)
    index = {"weight_map": {"a": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"gone\.safetensors"):
        weights.load(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        weights.load_config(tmp_path)


@pytest.mark.parametrize("format", ["diffusers", "orbax"])
@pytest.mark.parametrize("placed", [False, True])
def test_values_that_are_not_finite_are_refused_by_name(params, tmp_path, format, placed):
    spoilt = jax.tree.map(lambda x: x, params)
    kernel = params["blocks"]["image"]["query"]["kernel"]
    spoilt["blocks"]["image"]["query"]["kernel"] = kernel.at[1, 2, 3].set(jnp.nan)
    weights.save(spoilt, tmp_path / "model", format, config=CONFIG)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: one, params) if placed else None
    name = r"transformer_blocks\.1\.attn\.to_q\.weight"
    if format == "orbax":
        name = "blocks/image/query/kernel"
    with pytest.raises(ValueError, match=name):
        weights.load(tmp_path / "model", CONFIG, places)
