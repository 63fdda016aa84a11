"""Checkpoints of torch.save, read without torch: what torch wrote comes back, code does not run."""

import argparse
import collections
import os
import zipfile

import numpy as np
import pytest
import torch

from sage_grpo_jax.weights.formats import torch_zip


def same(stored, tensor):
    found = stored.read()
    assert found.shape == tuple(tensor.shape)
    if tensor.dtype == torch.bfloat16:
        assert str(found.dtype) == "bfloat16"
        found, tensor = found.astype(np.float32), tensor.float()
    np.testing.assert_array_equal(found, tensor.detach().numpy())


def test_dtypes_and_strides(tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    content = collections.OrderedDict(
        plain=base,
        transposed=base.permute(2, 0, 1),
        part=base[1:, ::2, 1:4],
        broadcast=torch.ones(1, 3).expand(4, 3),
        shared=base.view(-1)[7:19],
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        half=base.half(),
        brain=base.bfloat16(),
        double=base.double(),
        whole=torch.arange(4),
        flags=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(base[0].clone()),
    )
    content._metadata = {"": {"version": 1}}  # as state_dict() has it
    torch.save(content, tmp_path / "a.pt")
    found = torch_zip.read_file(tmp_path / "a.pt")
    assert list(found) == list(content)
    for name, tensor in content.items():
        same(found[name], tensor)
    assert found["transposed"].strides is not None
    assert found["plain"].strides is None
    slices = (slice(1, 4), slice(0, 2), slice(2, 3))
    np.testing.assert_array_equal(
        found["transposed"].read(slices), content["transposed"][1:4, 0:2, 2:3].numpy()
    )


def test_nested_dictionaries_and_other_values(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {"module": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3,
               "name": "run", "rate": 0.1, "nothing": None, "list": [1, (2,)]}  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    found = torch_zip.read_file(tmp_path / "a.pt")
    same(found["module.0.weight"], model[0].weight)
    assert sum(name.startswith("module.") for name in found) == 4
    same(found["optimizer.state.0.exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


class Evil:
    def __reduce__(self):
        return (os.mkdir, (Evil.target,))


def test_nothing_else_is_built(tmp_path):
    Evil.target = str(tmp_path / "touched")
    for value, name in (
        (Evil(), r"posix\.mkdir"),
        (argparse.Namespace(a=1), r"argparse\.Namespace"),
        (np.float32(1), "numpy"),
        (torch.nn.Linear(1, 1), r"torch\.nn"),
    ):
        torch.save({"module": {"w": torch.ones(2)}, "extra": value}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=rf"a\.pt cannot be read .*holds {name}"):
            torch_zip.read_file(tmp_path / "a.pt")
    assert not (tmp_path / "touched").exists()


def test_other_files(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"torch.save's old format.*save it again"):
        torch_zip.read_file(file)
    torch.save([torch.ones(2)], file)
    with pytest.raises(ValueError, match="holds a list instead of a dictionary"):
        torch_zip.read_file(file)
    torch.save({"w": torch.ones(2000)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a zip archive"):
        torch_zip.read_file(file)


def test_damaged_archives(tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.ones(100)}, good)

    def rewrite(change, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w", compression) as new:
            for name in old.namelist():
                data = change(name, old.read(name))
                if data is not None:
                    new.writestr(name, data)

    def of(ending, data):
        return lambda name, old: data if name.endswith(ending) else old

    for change, message in (
        (of("data/0", b"1234"), "storage 0 has 4 bytes"),
        (of("data/0", None), "storage 0 is missing"),
        (of("data.pkl", None), "0 members named data.pkl"),
        (of("data.pkl", b"\x80\x02}q"), "its pickle is damaged"),
        (of("byteorder", b"big"), "big-endian"),
    ):
        rewrite(change)
        with pytest.raises(ValueError, match=message):
            torch_zip.read_file(bad)
    rewrite(lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        torch_zip.read_file(bad)


def test_tensor_that_reaches_beyond_its_storage(tmp_path):
    class Forged:
        def __reduce__(self):
            _, arguments = torch.ones(4).__reduce_ex__(2)
            arguments = (arguments[0], 2, (3,), (1,), *arguments[4:])
            return (torch._utils._rebuild_tensor_v2, arguments)

    torch.save({"w": Forged()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="tensor w reaches beyond its storage"):
        torch_zip.read_file(tmp_path / "a.pt")


def test_protocols(tmp_path):
    for protocol in (2, 4):
        torch.save({"w": torch.ones(3)}, tmp_path / "a.pt", pickle_protocol=protocol)
        same(torch_zip.read_file(tmp_path / "a.pt")["w"], torch.ones(3))
