"""Progress of a conversion on stderr: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from sage_grpo_jax.common.progress import format_seconds, write_unless_lost

_BAR_WIDTH = 20
_BAR_SECONDS, _LINE_SECONDS = 0.1, 10.0


class Progress:
    """Counts bytes; `None` for the stream keeps silent.

    Args:
      total: bytes that will be written.
      stream: where to.
    """

    def __init__(self, total: int, stream: TextIO | None = sys.stderr) -> None:
        self.total, self.done = total, 0
        self._stream = stream
        self._terminal = stream is not None and stream.isatty()
        self._start = self._last = time.monotonic()

    def add(self, count: int, what: str = "") -> None:
        """`count` more bytes are done; `what` is the name of the tensor or parameter."""
        self.done += count
        now = time.monotonic()
        wait = _BAR_SECONDS if self._terminal else _LINE_SECONDS
        if now - self._last >= wait or self.done >= self.total:
            self._last = now
            self._show(what, now - self._start)

    def close(self) -> None:
        """Ends the line of the bar."""
        if self._terminal:
            write_unless_lost(self._stream, "\n")

    def _show(self, what: str, seconds: float) -> None:
        if self._stream is None:
            return
        share = self.done / self.total if self.total else 1.0
        rate = self.done / seconds if seconds > 0 else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        text = (
            f"{share:4.0%}  {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB  "
            f"{rate / 1e6:.0f} MB/s  {format_seconds(left)} left  {what}"
        )
        if self._terminal:
            bar = ("#" * int(share * _BAR_WIDTH)).ljust(_BAR_WIDTH, ".")
            width = shutil.get_terminal_size().columns - 1
            write_unless_lost(self._stream, f"\r{f'[{bar}] {text}'[:width]}\x1b[K")
        else:
            write_unless_lost(self._stream, text + "\n")
