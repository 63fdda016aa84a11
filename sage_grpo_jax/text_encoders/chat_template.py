"""A tokenizer's chat template, rendered as transformers does, in a process of its own.

A template is a program that comes with a model. It runs in jinja's sandbox, which keeps it from
files and from Python; but not from going on for ever, or from filling the memory. So it runs where
that ends with the process: this file is also the script of that process (jinja and the standard
library only). Source: `transformers/utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

MAX_SECONDS, MAX_BYTES = 20, 2 << 30
_MEMORY = f"{MAX_BYTES >> 30} GiB of memory"
# Characters of a template, and of all that one process makes of it.
_MAX_TEMPLATE, _MAX_TEXT = 1 << 20, 1 << 26
_PIECE = 10_000  # conversations in a process
_PATIENCE = 1800  # seconds that a busy machine may take for MAX_SECONDS of computing


def render(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    special_tokens: Mapping[str, Any],
) -> list[str]:
    """The text of each conversation, with the beginning of an answer.

    Args:
      template: in jinja's language.
      conversations: lists of {"role": .., "content": ..}.
      special_tokens: which templates may name.

    Raises:
      ValueError: a template that is no template, refuses the conversation, reaches for what the
        sandbox forbids, or needs too much time, memory or text.
    """
    if len(template) > _MAX_TEMPLATE:
        raise ValueError(
            f"the chat template has {len(template)} characters: must be at most {_MAX_TEMPLATE}"
        )

    # In pieces, so that the limits of a process do not depend on how many prompts there are.
    texts: list[str] = []
    for start in range(0, len(conversations), _PIECE):
        texts += _render_piece(template, conversations[start : start + _PIECE], special_tokens)
    return texts


def _render_piece(template: str, conversations: Sequence[Any], special_tokens: Any) -> list[str]:
    given = json.dumps([template, list(conversations), dict(special_tokens)])
    # -P keeps this folder off the path, where `template.py` and others lie.
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template takes more than {_PATIENCE} s") from None

    # A negative status is a signal, with which the kernel enforces most of `_limit`.
    if done.returncode < 0:
        raise ValueError(f"the chat template takes more than {MAX_SECONDS} s, or {_MEMORY}")
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"the chat template cannot be rendered: {reason[-1] if reason else ''}")
    return json.loads(done.stdout)


def _environment() -> Any:
    """transformers' environment, without its tag for training."""
    import jinja2
    from jinja2 import sandbox

    # Names with an underscore in front cannot be read in the sandbox, and must not be written.
    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"{name!r} in a namespace")
            super().__setitem__(name, value)

    def namespace(*args: Any, **values: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*args, **values).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # fmt: skip

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # As transformers has it: jinja's own escapes the text for HTML.
    environment.filters["tojson"] = tojson
    # Functions in the place of jinja's classes: a template gets hold of no class.
    environment.globals |= {
        "raise_exception": raise_exception,
        "namespace": namespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return environment


def _limit() -> None:
    """Ends the process where it takes too much."""
    import resource  # of Unix

    # CPU seconds; bytes that a file may grow to (a pipe is none); bytes of address space.
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))


def _main() -> None:
    # What is ours: not under the limits, for imports write files.
    template, conversations, special_tokens = json.load(sys.stdin)
    environment = _environment()
    _limit()

    # What is the template's.
    try:
        compiled = environment.from_string(template)
        texts, left = [], _MAX_TEXT
        for messages in conversations:
            values = {"messages": messages, "tools": None, "documents": None,
                      "add_generation_prompt": True}  # fmt: skip
            texts.append(compiled.render(**{**values, **special_tokens}))
            left -= len(texts[-1])
            if left < 0:
                raise ValueError(f"it makes more than {_MAX_TEXT} characters")
    except MemoryError:
        sys.exit(f"it takes more than {_MEMORY}")
    except Exception as error:  # a program of others raises anything
        sys.exit(" ".join(f"{type(error).__name__}: {str(error)[:300]}".split()))
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    _main()
