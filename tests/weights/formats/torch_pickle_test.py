"""Pickles and archives that nobody's torch.save wrote: refused in one line, in little memory."""

import collections
import contextlib
import io
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from sage_grpo_jax.weights.formats import headers, torch_pickle, torch_zip

STOP = b"."
END = b"\x80\x02"  # of protocol 2, the beginning


def archive(file, text, members=(("data/0", b"\0" * 64),)):
    """An archive like those of torch.save with another pickle."""
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("archive/data.pkl", text)
        for name, content in members:
            out.writestr(f"archive/{name}", content)
    return file


def refused(file, message):
    with pytest.raises(ValueError, match=rf"{file} cannot be read .*{message}") as error:
        torch_zip.read_file(file)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


# What costs much


def test_memo_index_of_2_to_the_26(tmp_path):
    """139 bytes took a gigabyte: C's unpickler makes room for every index below."""
    for put in (b"r" + struct.pack("<I", 2**26), b"r\xff\xff\xff\xff", b"p" + b"9" * 20 + b"\n"):
        file = archive(tmp_path / "a.pt", END + b"}" + put + STOP)
        tracemalloc.start()
        assert torch_zip.read_file(file) == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_shared_dictionaries_have_many_paths(tmp_path):
    """30 dictionaries, each twice in the next: 2^30 paths to the first; 120 s, once."""
    inner = {"w": torch.ones(2)}
    for _ in range(30):
        inner = {"a": inner, "b": inner}
    torch.save(inner, tmp_path / "deep.pt")
    refused(tmp_path / "deep.pt", "nested more than 16 deep")
    wide = {"w": torch.ones(2)}
    for _ in range(7):
        wide = {str(i): wide for i in range(30)}
    torch.save(wide, tmp_path / "wide.pt")
    start = time.process_time()
    refused(tmp_path / "wide.pt", "or hold more than 1048576 values")
    assert time.process_time() - start < 60


def test_shared_dictionaries_are_fine_otherwise(tmp_path):
    shared = {"w": torch.ones(2)}
    torch.save({"module": shared, "ema": shared}, tmp_path / "a.pt")
    found = torch_zip.read_file(tmp_path / "a.pt")
    assert list(found) == ["module.w", "ema.w"]


def test_recursive_dictionaries(tmp_path):
    own = {"w": torch.ones(2)}
    own["self"] = own
    torch.save(own, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "nested more than 16 deep")
    one, other = {}, collections.OrderedDict()
    one["b"], other["a"] = other, one
    torch.save({"x": [one]}, tmp_path / "b.pt")
    assert torch_zip.read_file(tmp_path / "b.pt") == {}  # lists hold no tensors with names
    torch.save(one, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "nested more than 16 deep")


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x96" + struct.pack("<Q", 2**40),  # BYTEARRAY8: the unpickler makes room for it
        b"\x8e" + struct.pack("<Q", 2**62),
        b"B" + struct.pack("<I", 2**31),
        b"X" + struct.pack("<I", 2**31),
        b"\x8b" + struct.pack("<i", 2**31 - 1),
        b"\x95" + b"\xff" * 8,
    ],
)
def test_lengths_that_lie(opcodes, tmp_path):
    file = archive(tmp_path / "a.pt", END + opcodes + b"}" + STOP)
    tracemalloc.start()
    with contextlib.suppress(ValueError):  # a frame without end does no harm
        assert torch_zip.read_file(file) == {}
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_large_members(tmp_path):
    file = archive(tmp_path / "a.pt", b" " * (torch_pickle.MAX_BYTES + 1))
    refused(file, "data.pkl has 8388609 bytes: must be at most 8388608")


def test_names_are_short_and_printable(tmp_path):
    for name in ("a" * 1000, "a\nb", ""):
        torch.save({name: torch.ones(1)}, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "no name of a tensor")
    torch.save({"a" * 300: {"b" * 300: {"w": torch.ones(1)}}}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "no name of a tensor")


# What makes no sense


class Forged:
    """Pickled as a tensor with other arguments."""

    def __init__(self, **changes):
        self.changes = changes

    def __reduce__(self):
        _, arguments = torch.ones(4).__reduce_ex__(2)
        names = ("storage", "offset", "shape", "strides")
        given = dict(zip(names, arguments, strict=False)) | self.changes
        return (torch._utils._rebuild_tensor_v2, (*given.values(), *arguments[4:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": None}, r"a tensor without storage \(None\)"),
        ({"storage": {}}, r"a tensor without storage \(\{\}\)"),
        ({"offset": -1}, r"a tensor whose offset is \(-1,\)"),
        ({"offset": None}, r"a tensor whose offset is \(None,\)"),
        ({"offset": 1}, "tensor w reaches beyond its storage"),
        ({"shape": (5,)}, "tensor w reaches beyond its storage"),
        ({"shape": None}, "a tensor whose shape is None"),
        ({"shape": (True,)}, r"a tensor whose shape is \(True,\)"),
        ({"shape": (2**70,)}, "a tensor whose shape is"),
        ({"shape": (10**6,) * 3, "strides": (0,) * 3}, "a tensor with sizes"),
        ({"shape": (1,) * 50, "strides": (1,) * 50}, "a tensor whose shape is"),
        ({"strides": (-1,)}, r"a tensor whose strides is \(-1,\)"),
        ({"strides": (1, 1)}, r"a tensor with sizes \(4,\), strides \(1, 1\)"),
        ({"strides": (2**40,)}, "tensor w reaches beyond its storage"),
    ],
)
def test_forged_tensors(changes, message, tmp_path):
    torch.save({"w": Forged(**changes)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)


class _Storage:
    def __init__(self, identifier):
        self.identifier = identifier


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identifier if isinstance(value, _Storage) else None


def storages(*identifiers):
    """A pickle of tensors of 4 elements, of storages with these identifiers."""
    out = io.BytesIO()
    tensors = {f"w{i}": Forged(storage=_Storage(given)) for i, given in enumerate(identifiers)}
    _Pickler(out, protocol=2).dump(tensors)
    return out.getvalue()


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        (("storage", torch.FloatStorage, "0", "cpu", 4), None),
        (("storage", torch.FloatStorage, "0", "cpu", 17), "storage 0 has 64 bytes, too few for 17"),
        (("storage", torch.FloatStorage, "9", "cpu", 4), "storage 9 is missing"),
        (("storage", torch.FloatStorage, "../x", "cpu", 4), "storage ../x is missing"),
        (("storage", torch.FloatStorage, "0", "cpu", -4), "unknown storage"),
        (("storage", torch.FloatStorage, 0, "cpu", 4), "unknown storage"),
        (("storage", None, "0", "cpu", 4), "unknown storage"),
        (("storage", "float", "0", "cpu", 4), "unknown storage"),
        (("storage",), "unknown storage"),
        (("other", torch.FloatStorage, "0", "cpu", 4), "unknown storage"),
        (("storage", torch.FloatStorage, "0" * 1000, "cpu", 4), "no name"),
    ],
)
def test_storages(identifier, message, tmp_path):
    file = archive(tmp_path / "a.pt", storages(identifier))
    if message is None:
        np.testing.assert_array_equal(torch_zip.read_file(file)["w0"].read(), np.zeros(4))
    else:
        refused(file, message)


def test_one_storage_cannot_be_two_sizes(tmp_path):
    """Checked for each tensor, not only the first."""
    four, many = (("storage", torch.FloatStorage, "0", "cpu", count) for count in (4, 40))
    file = archive(tmp_path / "a.pt", storages(four, many), [("data/0", b"\0" * 16)])
    refused(file, "storage 0 has 16 bytes, too few for 40 of float32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "its pickle is damaged"),
        (STOP, "its pickle is damaged"),
        (END + b"}", "its pickle is damaged|cut off"),
        (END + b"}}R" + STOP, r"\{\} is called"),
        (END + b"]K\x01K\x02s" + STOP, "its pickle is damaged: no dictionary"),
        (END + b"}]K\x02s" + STOP, r"key \[\] of a dictionary: must be a string"),
        (END + b"}(K\x01u" + STOP, "no dictionary"),
        (END + b"}K\x01a" + STOP, "no list"),
        (END + b"}h\x07" + STOP, "its pickle is damaged: KeyError"),
        (END + b"}u" + STOP, "its pickle is damaged: IndexError"),
        (END + b"\x85" + STOP, "its pickle is damaged: IndexError"),
        (END + b"K\x01}b" + STOP, "attributes of something without"),
        (END + b"}2" + STOP, "its pickle has DUP at byte 3: not of torch.save"),
        (END + b"cos\nsystem\n." + STOP, r"holds os\.system"),
        (END + b"(i__main__\nx\n" + STOP, "its pickle has INST"),
        (END + b"ctorch\nSize\n)\x81" + STOP, "its pickle has NEWOBJ"),
        (END + b"ccollections\nOrderedDict\n}\x85R" + STOP, "an OrderedDict that is made of"),
        (END + b"\x82\x01" + STOP, "its pickle has EXT1"),
        (END + b"L" + b"9" * 5000 + b"L\n" + STOP, "its pickle is damaged: Exceeds the limit"),
        (END + b"K\x01" + STOP, "holds a int instead of a dictionary"),
    ],
)
def test_pickles_that_are_none(text, message, tmp_path):
    refused(archive(tmp_path / "a.pt", text), message)


# Archives


def rewritten(tmp_path, method=zipfile.ZIP_STORED, only=None):
    """An archive of torch.save, with one member (or all) compressed otherwise."""
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "good.pt")
    file = tmp_path / "bad.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            chosen = only is None or name.endswith(only)
            new.writestr(name, old.read(name), method if chosen else zipfile.ZIP_STORED)
    return file


def set_in_directory(file, name, place, value):
    """Overwrites a field of a member's entry in the directory, and of its local header."""
    data = bytearray(file.read_bytes())
    for mark, shift in ((b"PK\x01\x02", 0), (b"PK\x03\x04", -2)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            if name in bytes(data[at : at + 46 + 30]):
                data[at + place + shift : at + place + shift + len(value)] = value
    file.write_bytes(data)


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "byteorder"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members(member, method, tmp_path):
    refused(rewritten(tmp_path, method, member), rf"{member} is compressed \(method {method}\)")


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_encrypted_unknown_and_corrupt_members(member, tmp_path):
    file = rewritten(tmp_path)
    set_in_directory(file, member.encode(), 8, b"\x01\x08")
    refused(file, f"{member} is encrypted")
    file = rewritten(tmp_path)
    set_in_directory(file, member.encode(), 10, b"\x63\x00")
    refused(file, rf"{member} is compressed \(method 99\)")
    for size in (b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"):
        file = rewritten(tmp_path)
        set_in_directory(file, member.encode(), 20, size)
        set_in_directory(file, member.encode(), 24, size)
        refused(file, rf"{member} (is cut off|has \d+ bytes)|[Zz]ip64|torch.save's old format|")
    file = rewritten(tmp_path, zipfile.ZIP_DEFLATED, member)
    data = file.read_bytes()
    at = data.find(member.encode()) + len(member) + 4
    file.write_bytes(data[:at] + b"\xff" * 16 + data[at + 16 :])
    refused(file, f"{member} is compressed")


def test_checksum_of_the_pickle(tmp_path):
    file = rewritten(tmp_path)
    data = file.read_bytes()
    at = data.find(b"_rebuild_tensor_v2")
    file.write_bytes(data[:at] + b"_" + b"R" + data[at + 2 :])
    refused(file, "data.pkl is damaged: its checksum is another")


def test_bounds_of_names():
    assert headers.check_name("a.b") == "a.b"
