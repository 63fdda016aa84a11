"""Opening checkpoints of other codebases: safetensors or PyTorch files, plain or nested."""

from __future__ import annotations

import os
import pathlib

from sage_grpo_jax.weights.formats import safetensors_io, torch_zip
from sage_grpo_jax.weights.formats.stored_tensor import StoredTensor

# Training checkpoints hold the weights, and often their moving average, below these names.
KEYS = ("module", "ema")


def open_tensors(path: str | os.PathLike, src_key: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, by name; nothing but headers is read.

    Args:
      path: a file (safetensors, or PyTorch's zip format), or a folder with one file or shards.
      src_key: "module" or "ema", for a training checkpoint that holds both.

    Raises:
      ValueError: unreadable files; a key that is not there, or not given where it has to be.
    """
    path = pathlib.Path(path)
    if src_key is not None and src_key not in KEYS:
        raise ValueError(f"src_key={src_key!r}: must be one of {KEYS}")
    file = _torch_file(path)
    tensors = safetensors_io.read_files(path) if file is None else torch_zip.read_file(file)
    return _select(tensors, src_key, path, strict=file is None)


def _torch_file(path: pathlib.Path) -> pathlib.Path | None:
    """The PyTorch file to read: `path`, or the only one in a folder without safetensors."""
    if path.is_file():
        return path if path.suffix in torch_zip.SUFFIXES else None
    if not path.is_dir() or any(path.glob(f"*{safetensors_io.SUFFIX}")):
        return None
    files = [file for file in sorted(path.iterdir()) if file.suffix in torch_zip.SUFFIXES]
    if len(files) > 1:
        raise ValueError(f"path={path}: holds {[f.name for f in files]}: name the file to read")
    return files[0] if files else None


def _select(
    tensors: dict[str, StoredTensor], src_key: str | None, path: pathlib.Path, strict: bool
) -> dict[str, StoredTensor]:
    """The tensors below the key; all of them where nothing is nested.

    Args:
      strict: the file may hold nothing beside keys; a PyTorch file may (the optimizer's state).
    """
    found = [key for key in KEYS if any(name.startswith(f"{key}.") for name in tensors)]
    if not found and src_key is None:
        return tensors
    if src_key is None and len(found) > 1:
        raise ValueError(f"{path} holds both {' and '.join(found)}: choose with --src_key")

    # Names below the key are those of the model.
    key = src_key or found[0]
    if key not in found:
        raise ValueError(f"src_key={key!r}: {path} has no such key, only {found or 'plain names'}")
    others = [n for n in tensors if not n.startswith(tuple(f"{other}." for other in found))]
    if strict and others:
        raise ValueError(f"{path} holds tensors below {key} and others beside it: {others[:5]}")

    return {
        name.removeprefix(f"{key}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{key}.")
    }
