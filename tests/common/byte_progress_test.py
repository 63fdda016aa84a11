"""The progress of a conversion: a bar in a terminal, lines elsewhere, or silence."""

import errno
import io

from sage_grpo_jax.common import byte_progress as progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    shown = progress.Progress(4_000_000_000, stream)
    shown.add(1_000_000_000, "early")  # too soon after the start for a line
    shown.add(3_000_000_000, "blocks/last")
    shown.close()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.startswith("100%  4.00 of 4.00 GB")
    assert "blocks/last" in text
    assert "\r" not in text


def test_bar_in_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "_BAR_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    shown = progress.Progress(200, stream)
    shown.add(100, "a")
    shown.add(100, "b" * 80)
    shown.close()
    first, last = stream.getvalue().strip().split("\r")
    assert first.startswith("[##########..........]  50%")
    assert last.startswith("[####################] 100%")
    assert len(last.removesuffix("\x1b[K")) < 60


def test_silence():
    shown = progress.Progress(10, None)
    shown.add(10, "a")
    shown.close()
    assert shown.done == 10


class Full(Terminal):
    """Standard error on a disk that is full."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_behind_the_progress_does_not_stop_the_work():
    shown = progress.Progress(10, Full())
    shown.add(10, "a")
    shown.close()
    assert shown.done == 10
