"""What a kind of text encoder brings along; the kinds are listed in `registry`."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What an encoder reads of one prompt, without padding."""

    ids: list[int]
    truncated: bool


class Tokenizer(Protocol):
    """Turns prompts into tokens, just as the model was trained to see them.

    Attributes:
      template_hash: SHA-256 of the template that prompts are put into; "" where there is none.
      details: what the manifest of a cache says about tokenizer and encoder.
    """

    template_hash: str
    details: dict[str, Any]

    def __call__(self, prompts: Sequence[str]) -> list[Tokens]: ...


Encode = Callable[[Sequence[Tokens]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of text encoder.

    Attributes:
      name: by which models and caches know it.
      model_types, architectures: of config.json, that this kind reads.
      max_tokens: of a prompt; what is longer loses its end.
      open_tokenizer: from the tokenizer's folder.
      open_encoder: from the network's folder, a dtype, a device and the tokenizer: a function from
        a batch to embeddings f32[tokens, D] each.
      companions: the other flags of `encode_prompts` that make sense beside it.
      libraries: besides torch and transformers, that decide what is computed.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    max_tokens: int
    open_tokenizer: Callable[[pathlib.Path], Any]
    open_encoder: Callable[[pathlib.Path, str, str, Any], Encode]
    companions: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
