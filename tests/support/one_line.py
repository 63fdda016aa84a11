"""What an error tells a person."""

import pytest


def one_line(error: pytest.ExceptionInfo) -> str:
    """What an error says; it has to be a line that can be read."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 6000
    return text
