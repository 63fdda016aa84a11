"""Glyph-ByT5: the embedding of the texts that a prompt quotes.

Equal to `_get_byt5_prompt_embeds` of diffusers' pipeline on the tokens that its mask keeps. It
runs in float32, as in the official code: the network is small, and T5 does not bear float16.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from sage_grpo_jax.text_encoders import torch_support

MAX_TOKENS = 256


class GlyphTokenizer:
    """Tokenizes glyph texts (see `template.glyph_text`), cut to `max_tokens`."""

    def __init__(self, folder: pathlib.Path, max_tokens: int = MAX_TOKENS) -> None:
        _, transformers = torch_support.load_libraries()
        self._tokenizer = torch_support.load_processor(transformers.AutoTokenizer, folder)
        self._max_tokens = max_tokens
        self.pad = self._tokenizer.pad_token_id or 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        # With T5's end token, which the network was trained to see; padding comes with the batch.
        return self._tokenizer(
            list(texts), truncation=True, max_length=self._max_tokens, add_special_tokens=True
        )["input_ids"]


class GlyphEncoder:
    """The T5 encoder.

    Raises:
      ValueError: a folder that holds another model, or tensors that do not fit.
    """

    def __init__(self, folder: pathlib.Path, device: str, pad: int) -> None:
        _, transformers = torch_support.load_libraries()
        self._device, self._pad = device, pad
        self._model = torch_support.load_model(
            transformers.T5EncoderModel, folder, "float32", device, unused=("decoder.", "lm_head.")
        )

    def __call__(self, tokens: Sequence[list[int]]) -> list[np.ndarray]:
        """Embeddings of a batch: f32[tokens, D] each."""
        return torch_support.embed_tokens(self._model, tokens, self._pad, self._device)
