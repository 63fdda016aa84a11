"""Which file of a folder is read, and which tensors of a training checkpoint."""

import numpy as np
import pytest
import safetensors.torch
import torch

from sage_grpo_jax.weights.formats import tensor_files


def values(path, src_key=None):
    found = tensor_files.open_tensors(path, src_key)
    return {name: float(tensor.read()) for name, tensor in found.items()}


def state(**numbers):
    return {name.replace("_", "."): torch.tensor(float(n)) for name, n in numbers.items()}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_the_only_file_of_torch_in_a_folder(suffix, tmp_path):
    torch.save(state(a=1, b=2), tmp_path / f"model{suffix}")
    (tmp_path / "notes.txt").write_text("mine")
    assert values(tmp_path) == {"a": 1, "b": 2} == values(tmp_path / f"model{suffix}")
    torch.save(state(a=3), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"path={tmp_path}: holds .*'other\.pt'.*: name the file"):
        values(tmp_path)
    assert values(tmp_path / "other.pt") == {"a": 3}


def test_safetensors_come_before_files_of_torch(tmp_path):
    torch.save(state(a=1), tmp_path / "model.pt")
    safetensors.torch.save_file(state(a=2), tmp_path / "model.safetensors")
    assert values(tmp_path) == {"a": 2}


def test_keys_of_training_checkpoints(tmp_path):
    file = tmp_path / "both.safetensors"
    safetensors.torch.save_file(state(module_a=1, ema_a=2), file)
    assert values(file, "module") == {"a": 1}
    assert values(file, "ema") == {"a": 2}
    with pytest.raises(ValueError, match="holds both module and ema: choose with --src_key"):
        values(file)
    with pytest.raises(ValueError, match=r"src_key='model': must be one of \('module', 'ema'\)"):
        values(file, "model")
    safetensors.torch.save_file(state(ema_a=2, b=3), file)
    with pytest.raises(ValueError, match=r"tensors below ema and others beside it: \['b'\]"):
        values(file)
    safetensors.torch.save_file(state(a=1), file)
    with pytest.raises(ValueError, match=r"src_key='ema': .* no such key, only plain names"):
        values(file, "ema")


def test_the_optimizer_may_lie_beside_the_weights_in_a_file_of_torch(tmp_path):
    torch.save({"module": state(a=1), "optimizer": state(a=9)}, tmp_path / "model.pt")
    found = tensor_files.open_tensors(tmp_path)
    assert [*found] == ["a"]
    np.testing.assert_array_equal(found["a"].read(), np.float32(1))
