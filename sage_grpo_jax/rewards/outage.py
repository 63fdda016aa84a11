"""Log lines about a server that does not answer: one heartbeat for all calls that wait."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from sage_grpo_jax.rewards import types

_log = logging.getLogger(__name__)


class OutageLog:
    """Says every `heartbeat` seconds that the server is away, and once that it is back.

    Fed by many threads; the outage ends with the first answer to any of them.
    """

    def __init__(self, address: str, heartbeat: float) -> None:
        self._address = address
        self._heartbeat = heartbeat
        self._lock = threading.Lock()
        self._deadlines: list[float] = []
        self._since: float | None = None
        self._next_line = 0.0
        self._announced = False
        # (code, message) of the last failure, while the outage lasts.
        self.last: tuple[str, str] | None = None

    @contextlib.contextmanager
    def watching(self, deadline: float) -> Iterator[None]:
        """Counts a call, given up at `deadline` (`time.monotonic`), while the block runs."""
        with self._lock:
            self._deadlines.append(deadline)
        try:
            yield
        finally:
            with self._lock:
                self._deadlines.remove(deadline)

    def failed(self, code: str, message: str) -> None:
        """A call failed and will be repeated. A full queue is worth a line only when it lasts."""
        now = time.monotonic()
        with self._lock:
            self.last = (code, message)
            # The outage begins with the first failure of any call.
            if self._since is None:
                self._since, self._next_line = now, now + self._heartbeat

            # One line at once, then one for each heartbeat, however many calls fail.
            first = not self._announced and code != types.RESOURCE_EXHAUSTED
            if not first and now < self._next_line:
                return
            self._next_line = now + self._heartbeat
            self._announced = True

            waiting, seconds = len(self._deadlines), now - self._since
            left = max(0.0, min(self._deadlines, default=now) - now)
        # Outside the lock: slow logging must not hold up the calls.
        _log.warning(
            "reward service %s: %s for %.0f s, %d calls waiting, the first gives up in %.0f s: %s",
            *(self._address, code, seconds, waiting, left, message),
        )

    def answered(self) -> None:
        """A call succeeded."""
        with self._lock:
            if self._since is None:
                return
            seconds, announced = time.monotonic() - self._since, self._announced
            self._since, self._announced, self.last = None, False, None
        if announced:
            _log.warning("reward service %s: answers again after %.1f s", self._address, seconds)
