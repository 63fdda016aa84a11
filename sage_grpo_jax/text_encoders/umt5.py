"""UMT5's encoder: the embedding of a whole prompt for Wan.

Equal to `_get_t5_prompt_embeds` of diffusers' `WanPipeline` (with ftfy installed) on the tokens
that its mask keeps. Wan itself reads MAX_TOKENS tokens without a mask: the ones after the prompt's
are zeros, and stay what the padding of a batch makes them.
"""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sage_grpo_jax.text_encoders import torch_support
from sage_grpo_jax.text_encoders.kind import Kind, Tokens

NAME = "umt5"
MAX_TOKENS = 512


def clean(prompt: str) -> str:
    """A prompt as Wan was trained to see it: mended, without entities, single spaces.

    Entities are resolved twice, as in diffusers, on top of ftfy, which does so where no "<" is.

    Raises:
      ModuleNotFoundError: a prompt that ftfy may change, where it is not installed.
    """
    unescaped = html.unescape(html.unescape(_mend(prompt)))
    return " ".join(unescaped.split())


def _mend(prompt: str) -> str:
    """Text that was decoded wrongly, wide letters, curly quotes and the like, put right.

    Not without ftfy, as diffusers has it: the embedding would differ, and nobody would see it. In
    printable ASCII without entities there is nothing that ftfy changes.
    """
    if prompt.isascii() and prompt.isprintable() and "&" not in prompt:
        return prompt
    try:
        import ftfy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ftfy is not installed; prompts beyond plain ASCII, such as {prompt[:40]!r}, need: "
            "pip install sage_grpo_jax[text]"
        ) from error
    return ftfy.fix_text(prompt)


class PromptTokenizer:
    """Cleans prompts and tokenizes them; the last of the tokens says that a prompt ends.

    Raises:
      ValueError: a tokenizer that cannot be read, or gives no tokens for a prompt.
    """

    template_hash = ""

    def __init__(self, folder: pathlib.Path, max_tokens: int = MAX_TOKENS) -> None:
        _, transformers = torch_support.load_libraries()
        self._folder, self._max_tokens = folder, max_tokens
        self._tokenizer = torch_support.load_processor(transformers.AutoTokenizer, folder)
        self.pad = self._tokenizer.pad_token_id or 0
        self.details: dict[str, Any] = {"max_tokens": max_tokens}

    def __call__(self, prompts: Sequence[str]) -> list[Tokens]:
        """Tokens of each prompt, at most `max_tokens`."""
        texts = [clean(prompt) for prompt in prompts]
        rows = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)["input_ids"]
        for prompt, ids in zip(prompts, rows, strict=True):
            if not ids:
                raise ValueError(f"{self._folder}: prompt {prompt[:40]!r} has no tokens")
        return [
            Tokens(ids, truncated=self._is_longer(text, ids))
            for text, ids in zip(texts, rows, strict=True)
        ]

    def _is_longer(self, text: str, ids: list[int]) -> bool:
        """Whether a text has more tokens than these, at most `max_tokens`, of it."""
        # A text of exactly this length fills the row too: only its own tokens tell.
        full = len(ids) == self._max_tokens
        return full and len(self._tokenizer(text)["input_ids"]) > self._max_tokens


class PromptEncoder:
    """The encoder.

    Raises:
      ValueError: a folder that holds another model, or tensors that do not fit.
    """

    def __init__(self, folder: pathlib.Path, dtype: str, device: str, pad: int) -> None:
        _, transformers = torch_support.load_libraries()
        config = torch_support.load_processor(transformers.UMT5Config, folder)
        # Wan's config says otherwise, but its file has one embedding for both places; some
        # versions of transformers believe the config and leave the other at zero.
        config.tie_word_embeddings = True
        self._device, self._pad = device, pad
        self._model = torch_support.load_model(
            transformers.UMT5EncoderModel,
            folder,
            dtype,
            device,
            unused=("decoder.", "lm_head."),
            config=config,
        )

    def __call__(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        """Embeddings of a batch: f32[tokens, D] each."""
        rows = [prompt.ids for prompt in prompts]
        return torch_support.embed_tokens(self._model, rows, self._pad, self._device)


def _open_encoder(
    folder: pathlib.Path, dtype: str, device: str, tokenizer: PromptTokenizer
) -> PromptEncoder:
    return PromptEncoder(folder, dtype, device, tokenizer.pad)


KIND = Kind(
    name=NAME,
    model_types=("umt5",),
    architectures=("UMT5EncoderModel", "UMT5Model", "UMT5ForConditionalGeneration"),
    max_tokens=MAX_TOKENS,
    open_tokenizer=PromptTokenizer,
    open_encoder=_open_encoder,
    libraries=("ftfy",),
)
