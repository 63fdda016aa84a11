"""Damage to files: of any bytes, and of the parts that JSON, safetensors, zip and pickle have.

Every function takes a `random.Random` and is deterministic in it.
"""

from __future__ import annotations

import io
import json
import pathlib
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Bytes = Callable[[bytes, random.Random], bytes]
_RAW = "@raw{}@"  # stands for JSON text that `json` does not write
_RAW_TEXTS = ("[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "1" * 5_000, "1e999", "NaN",
              "-Infinity", '{"a": 1, "a": 2}', "nul")  # fmt: skip
_VALUES = (
    *(None, True, False, 0, 1, 2, 3, 7, -1, -8, 2**31, 2**53, 2**63, 2**64, 10**400, -(10**30)),
    *(0.0, -0.5, 1e308, 1e-320, 2.5, "", "x", "x" * 10_000, "../outside", "/etc/passwd", "a\nb"),
    *("\u0000", "\ud800", "t2v", "sr", "F32", "I64", "BF16", [], {}, [[]], [1, 2, 3], ["a"]),
    *([0] * 10_000, {"": ""}, {"a": {"b": {}}}, [None], [2**40] * 5),
    *(_RAW.format(i) for i in range(len(_RAW_TEXTS))),
)


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, set, cut, inserted, repeated or moved bytes, a few times."""
    if rng.random() < 0.3:  # nothing moves: the values of tensors, or a letter of a header
        changed = bytearray(data)
        for _ in range(rng.choice((1, 4, 64))):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        data = _one_change(bytearray(data), rng)
    return data


def _one_change(data: bytearray, rng: random.Random) -> bytes:
    # Headers are at the beginning, a zip's directory is at the end.
    near = rng.choice((len(data), min(len(data), 256)))
    at = rng.randrange(near) if near else 0
    if rng.random() < 0.2:
        at = len(data) - at
    length = rng.choice((1, 2, 8, 100, 1000))
    match rng.randrange(8):
        case 0 | 1:
            if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
        case 2:
            data[at : at + length] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80, 0x22))]) * length
        case 3:
            del data[at:]
        case 4:
            del data[at : at + length]
        case 5:
            data[at:at] = rng.randbytes(length)
        case 6:
            data[at:at] = data[at : at + length]
        case 7:
            other = rng.randrange(len(data) + 1)
            data[at : at + length], data[other : other + length] = (
                data[other : other + length],
                data[at : at + length],
            )
    return bytes(data)


def json_text(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with other values, keys and nestings; now and then other bytes."""
    if rng.random() < 0.15:
        return any_bytes(data, rng)
    values = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_node(values, rng)
    text = json.dumps(values[0])
    for i, raw in enumerate(_RAW_TEXTS):
        text = text.replace(f'"{_RAW.format(i)}"', raw)
    return text.encode()


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below."""
    found = []
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += _nodes(value[key])
    return found


def _change_node(values: list[Any], rng: random.Random) -> None:
    nodes = _nodes(values)
    container, key = rng.choice(nodes)
    change = rng.randrange(7) if isinstance(container, dict) else rng.choice((0, 6))
    if change <= 2:
        container[key] = rng.choice(_VALUES)
    elif change == 6 and isinstance(container[key], int | float):
        container[key] = rng.choice((container[key] + 1, container[key] * 2, container[key] // 2))
    elif change == 6:
        container[key] = container[key] or None
    elif change == 3:
        del container[key]
    elif change == 4:
        container[rng.choice(("x", "", "__metadata__", "../y", f"{key}2", "z" * 2000))] = (
            container.pop(key)
        )
    else:
        other, name = rng.choice(nodes)
        container[key] = other[name] if not isinstance(other[name], dict | list) else None


def safetensors_file(data: bytes, rng: random.Random) -> bytes:
    """Another header with its length set right, another length, or any bytes."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(10)
    if kind < 6:
        header = json_text(header, rng)
        return struct.pack("<Q", len(header)) + header + rest
    if kind == 6:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong % 2**64) + data[8:]
    return any_bytes(data, rng)


# Pickle opcodes that cost much, call, or make no sense where they stand.
_OPCODES = (
    *(b"r\x00\x00\x00\x04", b"r\xff\xff\xff\xff", b"p99999999999\n", b"q\x00", b"\x94", b"h\xff"),
    *(b"j\xff\xff\xff\x7f", b"g7\n", b"}", b"]", b")", b"(", b"0", b"1", b"2", b"N", b"\x88", b"."),
    *(b"\x96\x00\x00\x00\x00\x04\x00\x00\x00", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x97"),
    *(b"X\xff\xff\xff\x7f", b"\x8c\x05hello", b"C\x03abc", b"J\xff\xff\xff\xff", b"K\x01", b"I9\n"),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 9, b"L" + b"9" * 5000 + b"L\n", b"G" * 9),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n)R"),
    *(bytes([code]) for code in b"\x93RbQ\x81\x92oaetdlsu\x85\x86\x87\x8f\x90\x91"),
    *(b"i\nx\n", b"\x82\x01", b"P0\n"),
    *(b"}q\x01X\x01\x00\x00\x00ah\x01s", b"]q\x01h\x01a", b"\x95" + b"\xff" * 8),
    # A dictionary of shared dictionaries: 2^30 paths.
    b"}q\x02" + b"".join(b"}q%cK\x00h%csK\x01h%cs" % (n + 1, n, n) for n in range(2, 32)),
)


def pickle_text(data: bytes, rng: random.Random) -> bytes:
    """Opcodes put in, bytes changed."""
    if rng.random() < 0.4:
        return any_bytes(data, rng)
    text = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.choice((2, len(text) - 1, rng.randrange(2, len(text))))
        text[at : at + rng.choice((0, 0, 1, 5))] = rng.choice(_OPCODES)
    return bytes(text)


def torch_archive(data: bytes, rng: random.Random) -> bytes:
    """Another pickle, other members, compressed or encrypted ones, or any bytes."""
    kind = rng.randrange(10)
    if kind < 2:
        return any_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    pickle = next(name for name in members if name.endswith("data.pkl"))
    compression = dict.fromkeys(members, zipfile.ZIP_STORED)
    target = rng.choice((pickle, rng.choice(sorted(members))))
    if kind < 7:
        members[pickle] = pickle_text(members[pickle], rng)
    elif kind == 7:
        methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        compression[target] = rng.choice(methods)
    elif kind == 8:
        match rng.randrange(4):
            case 0:
                del members[target]
            case 1:
                members[target] = any_bytes(members[target], rng)
            case 2:
                members[f"{target}x"] = members.pop(target)
            case 3:
                members[f"a/{target}"] = members[target]

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, compression.get(name))
    return _other_flags(out.getvalue(), target, rng) if kind in (7, 9) else out.getvalue()


def _other_flags(data: bytes, name: str, rng: random.Random) -> bytes:
    """A member's entry in the directory says encrypted, another method, size or place."""
    changed = bytearray(data)
    at = changed.rfind(b"PK\x01\x02", 0, changed.rfind(name.encode()))
    fields = {8: (b"\x01\x00", b"\x41\x08"), 10: (b"\x63\x00", b"\x08\x00", b"\x0e\x00"),
              16: (b"abcd",), 20: (b"\xff" * 4,), 24: (b"\xff" * 3 + b"\x7f",), 28: (b"\xff" * 2,),
              42: (b"\xff" * 3 + b"\x7f",)}  # fmt: skip
    place = rng.choice(sorted(fields))
    value = rng.choice(fields[place])
    changed[at + place : at + place + len(value)] = value
    return bytes(changed)


def mutate_folder(folder: pathlib.Path, rng: random.Random) -> str:
    """Damages one file of a folder; says what it did."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    # As often a file that says something about others as one with data.
    described = [file for file in files if not file.name.isdigit() and file.parent.name != "c"]
    file = rng.choice(rng.choice((files, described or files)))
    name, data = file.relative_to(folder), file.read_bytes()
    if rng.random() < 0.03:
        file.unlink()
        return f"{name} removed"
    if rng.random() < 0.01:
        file.unlink()
        file.mkdir()
        return f"{name} is a folder"
    mutate = _mutation(file, data)
    changed = mutate(data, rng)
    file.unlink()  # it may be a hard link
    file.write_bytes(changed)
    return f"{name}: {mutate.__name__}"


def _mutation(file: pathlib.Path, data: bytes) -> Bytes:
    if file.suffix == ".safetensors":
        return safetensors_file
    if file.suffix in (".pt", ".bin"):
        return torch_archive
    try:
        return json_text if isinstance(json.loads(data), dict | list) else any_bytes
    except ValueError:
        return any_bytes
