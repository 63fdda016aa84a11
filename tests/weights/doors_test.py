"""Every JSON at every door: what is none ends in one line with the file, whatever it says.

`fuzz_test` damages files at random; the kinds of nonsense that have a name are here, and, field by
field, beside the readers: `configs_test`, `formats/headers_test`, `formats/torch_pickle_test`, ...
"""

import fuzz_readers
import pytest
from one_line import one_line

from sage_grpo_jax.weights.formats import headers


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
    "deep": "[" * 100_000,
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
