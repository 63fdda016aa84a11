"""What is said to the two text encoders about a prompt.

The wording is part of the model: HunyuanVideo-1.5 was trained with it (`text_encoders/__init__.py`
and `format_prompt.py` of the official code; `pipeline_hunyuan_video1_5.py` of diffusers).
"""

import re

_ASPECTS = (
    "You are a helpful assistant. Describe the video by detailing the following aspects:",
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the "
    "objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video.",
)
# Nine spaces: the official source continues a string over indented lines, and they are tokens.
SYSTEM_MESSAGE = (" " * 9).join(_ASPECTS)
USER_MARKER = "<|im_start|>user\n"  # the prompt begins after it

_QUOTED = re.compile(r"\"(.*?)\"|“(.*?)”")


def conversation(prompt: str) -> list[dict[str, str]]:
    """The chat that the language model reads; the empty prompt becomes one space."""
    return [
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": prompt or " "},
    ]


def glyph_text(prompt: str) -> str | None:
    """What ByT5 reads: the texts that a prompt quotes, each once; None where it quotes nothing."""
    quoted = [straight or curly for straight, curly in _QUOTED.findall(prompt)]
    if not quoted:
        return None
    return "".join(f'Text "{text}". ' for text in dict.fromkeys(quoted))
