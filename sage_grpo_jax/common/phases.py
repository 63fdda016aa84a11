"""Seconds by phase of a step."""

import contextlib
import time
from collections.abc import Iterator


class PhaseTimer:
    """Seconds by phase: `with timer("rollout"): ...` adds to `time/rollout`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            key = f"time/{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + elapsed

    def finish(self) -> dict[str, float]:
        """The seconds of all phases, and of the whole since the timer was made as `time/step`."""
        return {**self.seconds, "time/step": time.perf_counter() - self._started}
