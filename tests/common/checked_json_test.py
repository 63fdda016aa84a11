"""JSON of others: what is no JSON, what has another type, and what is shown of it."""

import dataclasses
import json
import math

import pytest

from sage_grpo_jax.common import checked_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", r"not JSON: Exceeds the limit .* has 5000 digits$"),
        ('{"a": NaN}', "NaN is no number in JSON"),
        ('{"a": -Infinity}', "-Infinity is no number in JSON"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "key 'b' is there twice"),
        ('{"a": 1', "not JSON: Expecting"),
        (b"\xff\xfe{}", "not JSON: 'utf-8' codec"),
        ("[1]", r"not a JSON object: \[1\]"),
        ("null", "not a JSON object: None"),
        ("3", "not a JSON object: 3"),
        ('{"a": "' + "x" * 2**20 + '"}', "longer than 1048576 bytes"),
    ],
)
def test_what_is_no_json(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checked_json.parse(text)
    file = tmp_path / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        checked_json.load(file)


def test_good_json_is_what_json_reads(tmp_path):
    values = {"a": [1, 2.5, None, True, "ü"], "b": {"c": {}}, "": -(2**62)}
    (tmp_path / "a").write_text(json.dumps(values))
    assert checked_json.load(tmp_path / "a") == values
    assert checked_json.parse(b"\xef\xbb\xbf" + json.dumps(values).encode()) == values


def test_files_that_cannot_be_read(tmp_path):
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"{path}: cannot be read: {message}"):
            checked_json.load(path)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, int, True), (True, int, False), (1.0, int, False), (2**63 - 1, int, True),
        (2**63, int, False), (-(2**63), int, True), (10**400, int, False),
        (1, float, True), (1.5, float, True), (math.inf, float, False), (math.nan, float, False),
        (10**400, float, False), (True, float, False), ("1", float, False),
        (None, int | None, True), (None, int, False), (0, bool, False), (False, bool, True),
        ([1, 2], list[int], True), ([1, None], list[int], False), ((1, 2), list[int], False),
        ([1, 2], tuple[int, int], True), ([1], tuple[int, int], False),
        ([], tuple[int, ...], True), ([1, "a"], tuple[int, ...], False),
        ({"a": "b"}, dict[str, str], True), ({"a": 1}, dict[str, str], False),
        ([], dict, False), ({}, dict, True), ([[1]], list[list[int]], True),
    ],
)  # fmt: skip
def test_types(value, hint, fits):
    if fits:
        assert checked_json.typed(value, hint, "x") is value
        return
    with pytest.raises(ValueError, match=r"^x=.*: must be "):
        checked_json.typed(value, hint, "x")


def test_fields_of_a_dataclass():
    @dataclasses.dataclass
    class Both:
        size: int
        name: str | None = None
        runtime: int = 0

    assert checked_json.fields(Both, {"size": 3}) == {"size": 3}
    with pytest.raises(ValueError, match=r"unknown fields \['siz'\]: must be only"):
        checked_json.fields(Both, {"siz": 3})
    with pytest.raises(ValueError, match=r"unknown fields \['runtime'\]"):
        checked_json.fields(Both, {"runtime": 3}, without=("runtime",))
    with pytest.raises(ValueError, match="name=3: must be a string or null"):
        checked_json.fields(Both, {"size": 3, "name": 3})
    with pytest.raises(ValueError, match="size is missing: must be an integer"):
        checked_json.member({}, "size", int)


def test_whatever_is_shown_is_short():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    cycle = {}
    cycle["a"] = cycle
    for value in (
        10**5000,
        "x" * 10**6,
        [0] * 10**6,
        {str(i): i for i in range(10**4)},
        deep,
        cycle,
    ):
        assert len(checked_json.shown(value)) < 600
    while deep:  # taken apart: freeing it at once may need as many frames
        deep = deep[0]
    assert checked_json.shown("a\nb") == "'a\\nb'"
