"""Qwen2.5-VL's language model: the embedding of a whole prompt.

The embedding is `hidden_states[-3]`: what the last two layers and the final norm are given to
start from. So they are left out here, and no vision tower is built. Equal to
`_get_mllm_prompt_embeds` of diffusers' pipeline on the tokens that its mask keeps.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sage_grpo_jax.text_encoders import chat_template, template, torch_support
from sage_grpo_jax.text_encoders.kind import Kind, Tokens

NAME = "qwen2_5_vl"
MAX_TOKENS = 1000
SKIPPED_LAYERS = 2
_PLACEHOLDER = "\ue000"  # a private character: no template holds it


class PromptTokenizer:
    """Puts prompts into the template and tokenizes them.

    Attributes:
      crop_start: tokens before the prompt, which the embedding leaves out. Derived from the
        template; with the released tokenizer diffusers' pipeline has the constant 108.
      template_hash: SHA-256 of the template as the tokenizer writes it.

    Raises:
      ValueError: a tokenizer without chat template, one that starts the user's turn otherwise, or
        one that cannot be rendered (see `chat_template`).
    """

    def __init__(self, folder: pathlib.Path, max_tokens: int = MAX_TOKENS) -> None:
        _, transformers = torch_support.load_libraries()
        self._folder, self._max_tokens = folder, max_tokens
        self._tokenizer = torch_support.load_processor(transformers.AutoTokenizer, folder)

        # What the template puts before a prompt: all up to a mark in the prompt's place.
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(f"{folder}: the tokenizer has no chat template")
        (rendered,) = self._render([_PLACEHOLDER])
        head = rendered.partition(_PLACEHOLDER)[0]
        if not head.endswith(template.USER_MARKER):
            raise ValueError(
                f"{folder}: the chat template puts {head[-20:]!r} before the prompt; it must end "
                f"with {template.USER_MARKER!r}"
            )

        # The model reads its tokens with every prompt; the embedding leaves them out.
        self._head = self._tokenizer(head, add_special_tokens=False)["input_ids"]
        self.crop_start = len(self._head)

        self.template_hash = hashlib.sha256(rendered.encode()).hexdigest()
        self.pad = self._tokenizer.pad_token_id or 0
        self.details: dict[str, Any] = {
            "hidden_state": -1 - SKIPPED_LAYERS,
            "crop_start": self.crop_start,
            "max_tokens": max_tokens,
        }

    def __call__(self, prompts: Sequence[str]) -> list[Tokens]:
        """Tokens of each prompt: the template's `crop_start`, and at most `max_tokens` more.

        Raises:
          ValueError: when the template's tokens run into the prompt's.
        """
        # The template has its special tokens written out: the tokenizer adds none.
        rendered = self._render(prompts)
        rows = self._tokenizer(rendered, add_special_tokens=False)["input_ids"] if rendered else []
        # A tokenizer may join the end of the head with the beginning of a prompt.
        for prompt, ids in zip(prompts, rows, strict=True):
            if ids[: self.crop_start] != self._head:
                raise ValueError(
                    f"{self._folder}: prompt {prompt[:40]!r} does not start after the template's "
                    f"{self.crop_start} tokens"
                )

        limit = self.crop_start + self._max_tokens
        return [Tokens(ids[:limit], len(ids) > limit) for ids in rows]

    def _render(self, prompts: Sequence[str]) -> list[str]:
        """Prompts in the template; the same text as the tokenizer's `apply_chat_template`."""
        conversations = [template.conversation(prompt) for prompt in prompts]
        try:
            chat = self._tokenizer.get_chat_template()  # a ValueError: several, none is the default
            return chat_template.render(chat, conversations, self._tokenizer.special_tokens_map)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {error}") from error


class PromptEncoder:
    """The language model, without what `hidden_states[-3]` does not depend on.

    Raises:
      ValueError: a folder that holds another model, or tensors that do not fit.
    """

    def __init__(
        self, folder: pathlib.Path, dtype: str, device: str, crop_start: int, pad: int
    ) -> None:
        self._device, self._crop_start, self._pad = device, crop_start, pad
        self._model = load_language_model(folder, dtype, device)

    def __call__(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        """Embeddings of a batch: f32[tokens - crop_start, D] each."""
        return torch_support.embed_tokens(
            self._model,
            [prompt.ids for prompt in prompts],
            self._pad,
            self._device,
            skipped=self._crop_start,
            use_cache=False,
        )


def load_language_model(folder: pathlib.Path, dtype: str, device: str) -> Any:
    """The text model of a diffusers text_encoder/, or of a whole Qwen2.5-VL folder.

    Its output is the embedding: the last two layers and the final norm are cut off.
    """
    # Which part of which file.
    _, transformers = torch_support.load_libraries()
    config = torch_support.load_processor(transformers.AutoConfig, folder)
    options: dict[str, Any] = {}
    if config.model_type == "qwen2_5_vl":
        # Both spellings of the language model's tensors; the vision tower is never read.
        options["key_mapping"] = {r"^model\.language_model\.": "", r"^model\.(?!visual)": ""}
        config = config.text_config
    elif config.model_type != "qwen2_5_vl_text":
        raise ValueError(
            f"{folder}: model_type is {config.model_type!r}; allowed: qwen2_5_vl_text, qwen2_5_vl"
        )

    keep = config.num_hidden_layers - SKIPPED_LAYERS
    if keep < 1:
        raise ValueError(
            f"{folder}: {config.num_hidden_layers} layers; at least {SKIPPED_LAYERS + 1} needed"
        )

    # Onto the CPU first: what is cut off never takes memory of the device.
    model = torch_support.load_model(
        transformers.Qwen2_5_VLTextModel,
        folder,
        dtype,
        "cpu",
        unused=("visual.", "model.visual.", "lm_head."),
        config=config,
        **options,
    )

    # The class ends with a norm; in its place goes one that changes nothing.
    torch, _ = torch_support.load_libraries()
    del model.layers[keep:]
    model.norm = torch.nn.Identity()
    return model.to(device)


def _open_encoder(
    folder: pathlib.Path, dtype: str, device: str, tokenizer: PromptTokenizer
) -> PromptEncoder:
    return PromptEncoder(folder, dtype, device, tokenizer.crop_start, tokenizer.pad)


KIND = Kind(
    name=NAME,
    model_types=("qwen2_5_vl", "qwen2_5_vl_text"),
    architectures=("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLTextModel"),
    max_tokens=MAX_TOKENS,
    open_tokenizer=PromptTokenizer,
    open_encoder=_open_encoder,
    # HunyuanVideo's other encoders.
    companions=("byt5", "image_encoder", "vae", "height", "width"),
)
