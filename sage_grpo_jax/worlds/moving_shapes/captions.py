"""Which captions the moving-shapes world can say: refused by name before anything is spent."""

from collections.abc import Iterable

from sage_grpo_jax.data.prompts import Prompt
from sage_grpo_jax.worlds.moving_shapes import spec, word_embeddings

_SHOWN = 3  # prompts in a message


def check(prompts: Iterable[Prompt], *, whole: bool) -> None:
    """Refuses prompts that the small world has no words for.

    Every word would get a vector, but the small model knows those of its captions only.

    Args:
      prompts: to look through.
      whole: whether each has to be a whole caption, as a reward that reads it needs.

    Raises:
      ValueError: naming the prompts, what is wrong with each, and what is allowed.
    """
    wrong = [(prompt, reason) for prompt in prompts if (reason := _reason(prompt.text, whole))]
    if wrong:
        told = "; ".join(
            f"prompt {p.id!r} ({_short(p.text)}): {text}" for p, text in wrong[:_SHOWN]
        )
        more = f"; and {len(wrong) - _SHOWN} more prompts" if len(wrong) > _SHOWN else ""
        raise ValueError(told + more)


def incomplete(texts: Iterable[str]) -> list[str]:
    """The texts that are no whole captions, which is all that the small model was trained on."""
    return [text for text in texts if not _parses(text)]


def _reason(text: str, whole: bool) -> str | None:
    """What is wrong with a caption; None where nothing is."""
    # Words first: a prompt of known words may be meant as less than a caption.
    known = spec.vocabulary()
    unknown = [word for word in word_embeddings.tokenize(text) if word not in known]
    if unknown:
        return (
            f"the small world has no word {', '.join(map(repr, dict.fromkeys(unknown)))}; "
            f"allowed: {', '.join(known)}"
        )
    if whole and not _parses(text):
        return f"not a whole caption; allowed: as in {spec.example_caption()!r}"
    return None


def _parses(text: str) -> bool:
    try:
        spec.parse_caption(text)
    except ValueError:
        return False
    return True


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
