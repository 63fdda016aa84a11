"""Torch and transformers, imported when they are needed; loading that accepts no missing tensor."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float32", "float16")
DEVICES = ("auto", "cpu", "cuda")


def load_libraries() -> tuple[ModuleType, ModuleType]:
    """The modules torch and transformers, quieted.

    Raises:
      ModuleNotFoundError: saying what to install.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; the encoders need: pip install sage_grpo_jax[text]"
        ) from error
    # What it warns of on loading is an error here, with a message of its own.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def versions(optional: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the libraries that decide what the encoders compute.

    Args:
      optional: further ones, left out where they are not installed.
    """
    names = ["torch", "transformers", "tokenizers"]
    names += [name for name in optional if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in names}


def choose_device(device: str) -> str:
    """Says cuda or cpu; "auto" takes a GPU where there is one.

    Raises:
      ValueError: for a GPU that is not there.
    """
    torch, _ = load_libraries()
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device == "cuda" and not available:
        raise ValueError("device=cuda: torch finds no GPU; allowed here: cpu")
    return device


def load_model(
    model_class: Any,
    folder: pathlib.Path,
    dtype: str,
    device: str,
    unused: Sequence[str] = (),
    **options: Any,
) -> Any:
    """A network of transformers, from safetensors only, in evaluation mode on the device.

    Args:
      unused: prefixes of tensors in the file that this class has no use for.

    Raises:
      ValueError: files that cannot be read; tensors missing, misshapen or unexpected.
    """
    torch, _ = load_libraries()
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except Exception as error:  # damaged configs and files: whatever comes to transformers' mind
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder}: cannot be loaded as {model_class.__name__}: {first}"
        ) from error

    # transformers fills what is missing with random numbers, and only warns.
    unexpected = [key for key in report["unexpected_keys"] if not key.startswith(tuple(unused))]
    misshapen = [" ".join(map(str, key)) for key in report["mismatched_keys"]]
    faults = {"misshapen": misshapen, "missing": report["missing_keys"], "unexpected": unexpected}
    for what, keys in faults.items():
        if keys:
            raise ValueError(
                f"{folder}: tensors {what} for {model_class.__name__}: {len(keys)}, such as "
                f"{sorted(keys)[0]}"
            )
    return model.eval().to(device)


def load_processor(loader: Any, folder: pathlib.Path) -> Any:
    """A tokenizer, image processor or config; ValueError when its files cannot be read.

    Code that lies beside them is not run.
    """
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of tokenizers in Rust: a plain Exception
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: cannot be loaded: {first}") from error


def pad_tokens(
    tokens: Sequence[Sequence[int]], pad: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask i64[B, L], padded at the right to the longest."""
    torch, _ = load_libraries()
    # Batches are of about equal length, so that little of [B, L] is padding.
    length = max(len(row) for row in tokens)
    ids = torch.full((len(tokens), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return ids.to(device), mask.to(device)


def embed_tokens(
    model: Any,
    tokens: Sequence[Sequence[int]],
    pad: int,
    device: str,
    skipped: int = 0,
    **options: Any,
) -> list[np.ndarray]:
    """The first output of a network for a batch of texts: f32[tokens - skipped, D] each.

    Args:
      skipped: tokens at the beginning whose states are left out.
      **options: of the network's call.
    """
    torch, _ = load_libraries()
    ids, mask = pad_tokens(tokens, pad, device)
    with torch.inference_mode():
        # [B, L, D]; a row then loses the template on its left and the padding on its right.
        states = model(input_ids=ids, attention_mask=mask, **options)[0]
    return [to_numpy(states[row, skipped : len(values)]) for row, values in enumerate(tokens)]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Values as float32; exact for every dtype that the encoders run in."""
    return tensor.detach().float().cpu().numpy()
