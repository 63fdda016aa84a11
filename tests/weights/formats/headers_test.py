"""Headers and indexes of safetensors: one line with file and field, whatever they say."""

import json
import struct

import official_layout as official
import pytest
from one_line import one_line

from sage_grpo_jax.weights import store
from sage_grpo_jax.weights.formats import headers

DEEP = "[" * 100_000
HUGE = 10**400
ENTRY = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


def write_header(file, header, data=b"\0" * 32):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


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
