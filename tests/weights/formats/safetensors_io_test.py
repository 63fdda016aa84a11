"""The safetensors format against the safetensors library, and files that are damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from sage_grpo_jax.weights.formats import safetensors_io, tensor_files

SHAPES = {"a": (3, 4), "b": (), "c": (0, 2), "d": (5,)}


def values(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def write(folder, shapes=None, dtype=np.float32, **options):
    with safetensors_io.Writer(folder, "w", shapes or SHAPES, dtype, **options) as writer:
        for name, shape in (shapes or SHAPES).items():
            writer.write(name, values(shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_library_reads_what_we_write(dtype, tmp_path):
    write(tmp_path, dtype=dtype, metadata={"x": "y"})
    found = safetensors.torch.load_file(tmp_path / "w.safetensors")
    for name, shape in SHAPES.items():
        want = values(shape).astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(found[name].double().numpy(), want)
    with safetensors.safe_open(tmp_path / "w.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "x": "y"}


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {
        "f": torch.randn(4, 6),
        "h": torch.randn(3).half(),
        "b": torch.randn(2, 2).bfloat16(),
        "i": torch.arange(3),
        "o": torch.zeros(0, 4),
        "s": torch.tensor(3.0),
    }
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors", {"k": "v"})
    found, metadata = safetensors_io.read_file(tmp_path / "t.safetensors")
    assert metadata == {"k": "v"}
    for name, tensor in tensors.items():
        got = found[name].read()
        np.testing.assert_array_equal(got.astype(np.float64), tensor.double().numpy())
    whole = tensors["f"].numpy()
    for index in ((slice(1, 3), slice(None)), (slice(None), slice(2, 5)), (slice(2, 2), slice(1))):
        np.testing.assert_array_equal(found["f"].read(index), whole[index])


def test_shards_have_diffusers_names_and_index(tmp_path):
    write(tmp_path, {"a": (10,), "b": (20,), "c": (300,), "d": (5,), "e": (5,)}, max_shard_size=120)
    index = json.loads((tmp_path / "w.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 340}
    files = [f"w-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == dict(
        zip("abcde", [files[i] for i in (0, 0, 1, 2, 2)], strict=True)
    )
    found = tensor_files.open_tensors(tmp_path)
    np.testing.assert_array_equal(found["c"].read(), values((300,)))


def test_rows_in_any_order_but_all_of_them(tmp_path):
    whole = values((6, 2))
    with safetensors_io.Writer(tmp_path, "w", {"a": (6, 2)}, np.float32) as writer:
        writer.write("a", whole[2:], first_row=2)
        writer.write("a", whole[:2])
    found = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(found["a"], whole)
    writer = safetensors_io.Writer(tmp_path, "v", {"a": (1,), "b": (6, 2)}, np.float32)
    writer.write("a", whole[0, :1])
    writer.write("b", whole[:3])
    with pytest.raises(ValueError, match=r"not written, or not exactly once: \['b'\]"):
        writer.__exit__(None, None, None)
    with pytest.raises(ValueError, match="dtype=<class 'int'>: must be one of"):
        safetensors_io.Writer(tmp_path, "u", {}, int)


@pytest.mark.parametrize(
    ("text", "size"), [("10GB", 10**10), ("1.5 MB", 1_500_000), ("2GiB", 2**31)]
)
def test_sizes(text, size):
    assert safetensors_io.parse_size(text) == size


@pytest.mark.parametrize("text", ["10", "GB", "-1GB", "0GB", "1TB"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="max_shard_size"):
        safetensors_io.parse_size(text)


@pytest.fixture
def good(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(8), "b": torch.ones(2, 2)}, tmp_path / "g")
    return (tmp_path / "g").read_bytes()


def header(good, change):
    """The file with its header replaced by change(header)."""
    length = int.from_bytes(good[:8], "little")
    text = json.dumps(change(json.loads(good[8 : 8 + length]))).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


def entry(name, **fields):
    return lambda h: h | {name: h[name] | fields}


DAMAGES = {
    "empty": (lambda good: b"", "cut off"),
    "short_header": (lambda good: good[:20], "cut off"),
    "short_data": (lambda good: good[:-1], "has .* bytes, its header tells of"),
    "long_data": (lambda good: good + b"1", "has .* bytes, its header tells of"),
    "huge_length": (lambda good: b"\xff" * 8 + good[8:], "cut off or not one"),
    "not_json": (lambda good: good[:8] + b"?" + good[9:], "not JSON"),
    "list": (lambda good: header(good, lambda h: []), "not a JSON object"),
    "gap": (lambda g: header(g, entry("b", data_offsets=[36, 52])), "tensor b: bytes 36 to 52"),
    "overlap": (lambda g: header(g, entry("b", data_offsets=[16, 32])), "damaged: tensor b"),
    "shape": (lambda g: header(g, entry("a", shape=[9])), "damaged: tensor a"),
    "negative": (lambda g: header(g, entry("a", shape=[-8])), r"tensor a: shape=\[-8\]: must be"),
    "offsets": (lambda g: header(g, entry("a", data_offsets=[0])), "tensor a: data_offsets"),
    "dtype": (lambda g: header(g, entry("a", dtype="F2")), "dtype='F2': must be one of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(name, good, tmp_path):
    damage, message = DAMAGES[name]
    (tmp_path / "m.safetensors").write_bytes(damage(good))
    with pytest.raises(
        ValueError, match=f"m.safetensors cannot be read as safetensors: .*{message}"
    ):
        safetensors_io.read_file(tmp_path / "m.safetensors")


def test_folders(good, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(good)
    (folder / "b.safetensors").write_bytes(good)
    with pytest.raises(ValueError, match="must hold one"):
        tensor_files.open_tensors(folder)
    index = folder / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    with pytest.raises(ValueError, match="tensor a is in two files"):
        tensor_files.open_tensors(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no index of shards"):
        tensor_files.open_tensors(folder)
