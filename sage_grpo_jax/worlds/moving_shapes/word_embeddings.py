"""A text encoder that needs no weights: every word is a fixed random vector.

The vector of a word comes from a generator that is seeded with the SHA-256 of the word, so that
any machine computes the same one and no vocabulary has to be shipped. It stands in for the large
text encoder in the moving-shapes world and writes the same embedding cache.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from sage_grpo_jax.data import embedding_cache
from sage_grpo_jax.data.prompts import Prompt

NAME = "word_embeddings"
VERSION = 1
DIM = 32

# The one token of the empty prompt. No word can collide with it: words have no angle brackets.
EMPTY_TOKEN = "<empty>"

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def tokenize(text: str) -> list[str]:
    """The words of a prompt, lower-cased, in order, without punctuation.

    The empty prompt (nothing but white space) has the single token `EMPTY_TOKEN`.

    Raises:
      ValueError: for a text that is not empty but has no word in it.
    """
    if not text.strip():
        return [EMPTY_TOKEN]
    words = _WORD.findall(text.lower())
    if not words:
        raise ValueError(f"prompt {text!r} has no word; allowed: words, or the empty prompt")
    return words


def word_vector(word: str, dim: int = DIM) -> np.ndarray:
    """The vector of one token: f32[dim] of mean square exactly 1 (up to rounding)."""
    # Mean square 1, as a normalised layer of a large encoder would give.
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest(), "big")
    vector = np.random.Generator(np.random.PCG64(seed)).standard_normal(dim)
    return (vector / np.sqrt(np.mean(vector**2))).astype(np.float32)


def encode(text: str, dim: int = DIM) -> np.ndarray:
    """The embedding of one prompt: f32[number of words, dim]."""
    return np.stack([word_vector(word, dim) for word in tokenize(text)])


def encode_padded(texts: Sequence[str], dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of several prompts, padded with zeros to the longest.

    Returns:
      (text f32[N, L, dim], mask bool[N, L], true on words).
    """
    encoded = [encode(text, dim) for text in texts]
    length = max(len(tokens) for tokens in encoded)
    text = np.zeros((len(encoded), length, dim), np.float32)
    mask = np.zeros((len(encoded), length), bool)
    for row, tokens in enumerate(encoded):
        text[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return text, mask


def encoder(dim: int = DIM) -> embedding_cache.Encoder:
    """What the caches of these embeddings name as theirs; the vectors of two tokens stand for all.

    (Random numbers are not promised to stay the same from one NumPy to the next.)
    """
    table = np.stack([word_vector(word, dim) for word in ("red", EMPTY_TOKEN)]).astype("<f4")
    return embedding_cache.Encoder(
        f"{NAME}_{dim}",
        versions={NAME: str(VERSION)},
        models={"words": hashlib.sha256(table.tobytes()).hexdigest()},
    )


def write_cache(path: str | pathlib.Path, prompts: Iterable[Prompt], dim: int = DIM) -> None:
    """Writes the embedding cache of prompts, in float32 (the vectors are small)."""
    embedding_cache.write_cache(
        path, prompts, lambda text: encode(text, dim), encoder(dim), dtype="float32"
    )
