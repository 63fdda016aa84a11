"""What files say is checked at the door: one line with file and field, whatever they say.

`fuzz_test` damages files at random; here are the kinds of nonsense that have a name.
"""

import json
import shutil
import struct

import fuzz_readers
import jax
import numpy as np
import official_layout as official
import pytest

from sage_grpo_jax import weights
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.weights import configs, layouts, store
from sage_grpo_jax.weights.formats import headers
from sage_grpo_jax.weights.tables import hunyuan_video_keys
from sage_grpo_jax.weights.tables.key_table import check_tensors

DEEP = "[" * 100_000
HUGE = 10**400


def one_line(error) -> str:
    """What an error says; it has to be a line that can be read."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 6000
    return text


# config.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_num": 0}, "heads_num=0: must be at least 1"),
        ({"heads_num": -2}, "heads_num=-2: must be at least 1"),
        ({"heads_num": HUGE}, "heads_num=an integer of 1329 bits: must be an integer"),
        ({"mm_double_blocks_depth": 10**9}, "num_layers=1000000000: must be 1 to 1024"),
        ({"hidden_size": 2**40}, "attention_head_dim=549755813888: must be 1 to 4096"),
        ({"rope_theta": float("nan")}, "NaN is no number in JSON"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: must be positive, finite"),
        ({"rope_theta": HUGE}, "rope_theta=.*: must be a finite number"),
        ({"ideal_task": "sr"}, r"ideal_task=sr: must be one of \('t2v', 'i2v'\)"),
        ({"ideal_task": ["t2v"]}, r"ideal_task=\['t2v'\]: must be a string or null"),
        ({"patch_size": {}}, r"patch_size=\{\}: must be an integer or a list of 3"),
        ({"rope_dim_list": [4, 6]}, r"rope_dim_list=\[4, 6\]: must be a list of 3"),
        ({"mlp_width_ratio": 1e308}, r"mlp_ratio=1e\+308: must be such that 32 times it"),
        ({"_class_name": []}, r"_class_name=\[\]: must be a string or null"),
    ],
)
def test_tencents_config(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(official.DIT_JSON | changes))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: .*{message}") as error:
        weights.load_config(tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (official.DIT, {"num_attention_heads": 0}, "num_attention_heads=0: must be 1 to 1024"),
        (official.DIT, {"num_attention_heads": "2"}, "num_attention_heads='2': must be an integ"),
        (official.DIT, {"num_attention_heads": True}, "num_attention_heads=True: must be an inte"),
        (official.DIT, {"rope_theta": float("inf")}, "Infinity is no number in JSON"),
        (official.DIT, {"rope_theta": None}, "rope_theta=None: must be a finite number"),
        (official.DIT, {"rope_axes_dim": [-2, 12, 6]}, "three even numbers"),
        (official.DIT, {"task_type": "v2v"}, "task_type=v2v: must be one of"),
        (official.DIT, {"num_layers": HUGE}, "num_layers=an integer of 1329 bits"),
        (official.DIT, {"attention": "xla"}, r"unknown fields \['attention'\]"),
        (official.VAE, {"scaling_factor": 0}, "scaling_factor=0: must be positive"),
        (official.VAE, {"block_out_channels": "abc"}, "block_out_channels='abc': must be a list"),
        (official.VAE, {"block_out_channels": [8, 0, 32]}, "each must be 1 to 65536"),
        (official.VAE, {"block_out_channels": [8] * 99}, "at most 16"),
        (official.VAE, {"layers_per_block": 10**6}, "layers_per_block=1000000: must be 1 to 32"),
        (official.VAE, {"spatial_compression_ratio": 2**60}, "power of two up to 1024"),
        (official.VAE, {"dtype": "float32"}, r"unknown fields \['dtype'\]"),
    ],
)
def test_diffusers_config(config, changes, message, tmp_path):
    text = json.dumps(json.loads(config.to_json()) | changes)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: .*{message}") as error:
        weights.load_config(tmp_path)
    one_line(error)


# Every JSON at every door


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("doors")
    for name, door in fuzz_readers.DOORS.items():
        door.write(root / name)
    return root


JSON_FILES = {
    "single": ("config.json",),
    "shards": ("diffusion_pytorch_model.safetensors.index.json",),
    "tencent": ("config.json",),
    "adapters": ("peft/adapter_config.json",),
    "run_adapters": ("lora.json", "config.json", "params/state/_METADATA"),
    "run": ("lora.json", "transformer.json"),
    "orbax": ("config.json", "params/state/_METADATA"),
    "cache": ("manifest.json",),
}
TEXTS = {
    "deep": DEEP,
    "huge": '{"format_version": ' + "9" * 10_000 + "}",
    "list": "[]",
    "null": "null",
    "number": "3",
    "empty": "",
    "twice": '{"a": 1, "a": 2}',
    "nan": '{"a": NaN}',
    "long": "{}" + " " * (headers.MAX_BYTES + 1),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("door", "file"), [(d, f) for d in JSON_FILES for f in JSON_FILES[d]])
def test_any_json_that_is_none(door, file, text, good):
    path = good / door / file
    before = path.read_bytes()
    path.write_text(TEXTS[text])
    try:
        with pytest.raises(ValueError, match=r"not JSON|not a JSON object|longer than") as error:
            fuzz_readers.DOORS[door].read(good / door)
    finally:
        path.write_bytes(before)
    assert str(path) in one_line(error) or str(path.parent) in one_line(error)


# Headers and indexes of safetensors


def write_header(file, header, data=b"\0" * 32):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (DEEP.encode(), "nested too deeply"),
        ({"a": 3}, "tensor 'a'=3: must be an object"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, r"tensor a: dtype=\['F32'\]: must be a string"),
        ({"a": ENTRY | {"shape": [HUGE]}}, r"tensor a: shape=\[an integer of 1329 bits\]"),
        ({"a": ENTRY | {"shape": [2**62, 4]}}, "tensor a: shape=.*: must be at most 16 sizes"),
        ({"a": ENTRY | {"shape": [1] * 99}}, "tensor a: shape=.*: must be at most 16 sizes"),
        ({"a": ENTRY | {"shape": [0, 2**40, 2**40]}}, "tensor a: bytes 0 to 32"),
        ({"a": ENTRY | {"shape": [True] * 8}}, "tensor a: shape=.*: must be a list, each an int"),
        ({"a": ENTRY | {"data_offsets": [0, HUGE]}}, "tensor a: data_offsets=.*: must be a list"),
        ({"a": ENTRY | {"data_offsets": [-32, 0]}}, "tensor a: data_offsets=.*: must not be neg"),
        ({"a": ENTRY, "b": ENTRY}, "tensor b: bytes 0 to 32 .* ends at 32"),
        ({"a\nb": ENTRY}, "tensor 'a.*b': no name of a tensor"),
        ({"": ENTRY}, "tensor '': no name of a tensor"),
        ({"a" * 1000: ENTRY}, "no name of a tensor"),
        ({"__metadata__": [], "a": ENTRY}, r"__metadata__=\[\]: must be an object"),
        ({"__metadata__": None, "a": ENTRY}, "__metadata__=None: must be an object"),
        ({"__metadata__": 3, "a": ENTRY}, "__metadata__=3: must be an object"),
        ({"__metadata__": {"a": 3}, "a": ENTRY}, "__metadata__=.*: must be an object whose val"),
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
    ],
)
def test_headers(header, message, tmp_path):
    file = tmp_path / "m.safetensors"
    write_header(file, header)
    with pytest.raises(ValueError, match=rf"{file} cannot be read .*damaged: .*{message}") as error:
        store.open_source(file, official.DIT)
    one_line(error)


def test_header_that_is_too_long(tmp_path):
    file = tmp_path / "m.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", headers.MAX_BYTES + 1))
        stream.truncate(headers.MAX_BYTES + 100)
    with pytest.raises(ValueError, match=r"m\.safetensors .* the header has 25165825 bytes"):
        store.open_source(file, official.DIT)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "../outside.safetensors"},
            "weight_map: tensor a: '../outside.safetensors': must be",
        ),
        ({"a": "/etc/outside.safetensors"}, "must be the name of a .* file beside the index"),
        ({"a": "sub/inside.safetensors"}, "must be the name of"),
        ({"a": "..\\outside.safetensors"}, "must be the name of"),
        ({"a": "config.json"}, "must be the name of"),
        ({"a": ""}, "must be the name of"),
        ({"a": 3, "b": 4}, "weight_map=.*: must be an object whose values are each a string"),
        ({"a": None}, "weight_map=.*: must be an object"),
        ([["a", "m.safetensors"]], "weight_map=.*: must be an object"),
        (None, "weight_map=None: must be an object"),
        ({"a": "gone.safetensors"}, r"files that are not there: \['gone.safetensors'\]"),
        ({"a": "m.safetensors", "b": "m.safetensors"}, "not in the files it names: b"),
    ],
)
def test_indexes(weight_map, message, tmp_path):
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    folder.mkdir()
    write_header(outside, {"a": ENTRY})
    write_header(folder / "m.safetensors", {"a": ENTRY})
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=rf"{index}.*{message}") as error:
        store.open_source(folder, official.DIT)
    one_line(error)


# One missing tensor


@pytest.mark.parametrize("layout", hunyuan_video_keys.LAYOUTS)
@pytest.mark.parametrize("config", [official.DIT, official.VAE, HunyuanVideoConfig(), VaeConfig()])
def test_one_missing_tensor_is_that_and_nothing_else(config, layout):
    rows, shapes = layouts.key_table(config, layout)
    whole = {name: row.shape_there(shapes[row.ours]) for row in rows for name in row.names()}
    names = sorted(whole)
    for name in names[:: max(1, len(names) // 40)]:
        part = {other: shape for other, shape in whole.items() if other != name}
        configs.check_config(config, layout, part)
        with pytest.raises(ValueError, match=rf"; missing: {name.replace('.', '[.]')}$"):
            check_tensors(rows, shapes, part)
        more = whole | {f"{name}.extra": (1,)}
        configs.check_config(config, layout, more)


def test_a_missing_block_is_named_too():
    rows, shapes = layouts.key_table(official.DIT, "diffusers")
    whole = {name: row.shape_there(shapes[row.ours]) for row in rows for name in row.names()}
    part = {name: s for name, s in whole.items() if not name.startswith("transformer_blocks.1.")}
    configs.check_config(official.DIT, "diffusers", part)
    with pytest.raises(ValueError, match=r"missing: transformer_blocks\.1\.attn\.add_k_proj"):
        check_tensors(rows, shapes, part)
    # Fewer blocks are a model of another depth.
    part = {name: s for name, s in whole.items() if not name.startswith("transformer_blocks.2.")}
    with pytest.raises(ValueError, match="num_layers=3, the tensors say 2"):
        configs.check_config(official.DIT, "diffusers", part)


# Orbax


@pytest.fixture
def orbax(good, tmp_path):
    return shutil.copytree(good / "orbax", tmp_path / "model")


def load_on_device(folder):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = layouts.parameter_shapes(fuzz_readers.DIT)
    tree = {}
    for path in shapes:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = place
    return weights.load(folder, fuzz_readers.DIT, tree)


ARRAY = "params/state/blocks.image.query.kernel"


def _edit(change):
    def edit(folder):
        file = folder / ARRAY / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return edit


def _cut(folder):
    chunk = next(file for file in (folder / ARRAY / "c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-9])


def _remove_chunk(folder):
    next(file for file in (folder / ARRAY / "c").rglob("*") if file.is_file()).unlink()


def _escape(folder):
    file = folder / "params/state/_METADATA"
    text = file.read_text().replace('"key": "patch_embed"', '"key": "../../patch_embed"')
    assert "../.." in text
    file.write_text(text)


DAMAGES = {
    "cut": (_cut, "blocks.image.query.kernel cannot be read"),
    "chunk": (_remove_chunk, "blocks.image.query.kernel cannot be read"),
    "record": (lambda f: (f / ARRAY / "zarr.json").unlink(), "query.kernel cannot be read"),
    "text": (lambda f: (f / ARRAY / "zarr.json").write_text("{"), "query.kernel cannot be read"),
    "shape": (_edit({"shape": [2, 8, 9]}), "blocks/image/query/kernel"),
    "dtype": (_edit({"data_type": "int32"}), "query.kernel cannot be read"),
    "tree": (lambda f: (f / "params/state/_METADATA").write_text("{}"), "use_zarr3|tree_metadata"),
    "outside": (_escape, "tree_metadata: .*no name of an array"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_orbax_weights(damage, orbax, capfd):
    """As `sample` loads them: onto devices. Nothing but the line of the error is written."""
    jax.tree.map(np.asarray, load_on_device(orbax))
    capfd.readouterr()
    change, message = DAMAGES[damage]
    change(orbax)
    with pytest.raises(ValueError, match=message) as error:
        load_on_device(orbax)
    assert str(orbax) in one_line(error)
    assert capfd.readouterr() == ("", "")
