"""How far a long job is: one line that is rewritten in a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from typing import TextIO

_BAR = 24
# Between two plain lines; a log of a long job stays readable.
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts finished units and guesses the time left; a context manager.

    Args:
      total: how many units there are to do.
      unit: what they are, in the plural: "videos".
      stream: where to write; standard error by default.
    """

    def __init__(self, total: int, unit: str, stream: TextIO | None = None) -> None:
        self._total, self._unit = total, unit
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._done = 0
        self._last_line: float | None = None
        self._shown = ""

    def update(self, n: int = 1) -> None:
        """n more units are done."""
        self._done += n
        now = time.monotonic()
        due = self._last_line is None or now - self._last_line >= _SECONDS_BETWEEN_LINES
        # A terminal shows every unit, a log a line now and then and the last one.
        if not (self._terminal or due or self._done >= self._total):
            return
        self._last_line = now
        text = self._text(now - self._start)
        self._write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._shown = text

    def note(self, text: str) -> None:
        """A line that stays."""
        self._write(f"\r\x1b[K{text}\n{self._shown}" if self._terminal else f"{text}\n")

    def close(self) -> None:
        """Ends the line."""
        if self._terminal and self._shown:
            self._write("\n")
            self._shown = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _text(self, elapsed: float) -> str:
        each = elapsed / max(self._done, 1)
        left = format_seconds(each * max(self._total - self._done, 0))
        counts = f"{self._done}/{self._total} {self._unit}"
        bar = "#" * (_BAR * self._done // max(self._total, 1))
        start = f"[{bar:<{_BAR}}] " if self._terminal else ""
        return f"{start}{counts}, {each:.3g} s each, {left} left"

    def _write(self, text: str) -> None:
        write_unless_lost(self._stream, text)


def write_unless_lost(stream: TextIO, text: str) -> None:
    """Writes progress; where nobody reads the pipe, or the disk of a log is full, work goes on."""
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`; hours appear when there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
