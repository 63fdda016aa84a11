"""The wording, against diffusers' pipeline."""

import inspect

import pytest
from diffusers import HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5 import pipeline_hunyuan_video1_5 as theirs

from sage_grpo_jax.text_encoders import template


def test_the_system_message_is_theirs():
    signature = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds)
    assert signature.parameters["system_message"].default == template.SYSTEM_MESSAGE


@pytest.mark.parametrize("prompt", ["a cat", "", " ", 'a "sign"'])
def test_the_conversation_is_theirs(prompt):
    expected = theirs.format_text_input([prompt], template.SYSTEM_MESSAGE)[0]
    assert template.conversation(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", None),
        ("it's a cat's 'toy'", None),
        ('an open " quote', None),
        ('a "STOP" sign', 'Text "STOP". '),
        ("a “STOP” sign", 'Text "STOP". '),
        ('“A” then "B" then “C”', 'Text "A". Text "B". Text "C". '),
        ('"A" and "B" and “A”', 'Text "A". Text "B". '),
        ('an empty "" quote', 'Text "". '),
        ('mixed “A" and B', None),
        ('“outer "inner" outer”', 'Text "outer "inner" outer". '),
    ],
)
def test_glyph_text(prompt, expected):
    assert template.glyph_text(prompt) == expected
    assert theirs.extract_glyph_texts(prompt) == expected
