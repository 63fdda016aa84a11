"""One sample on its way to the reward server and back: its request, its clock, its failure."""

import time
from concurrent import futures
from typing import NamedTuple

from sage_grpo_jax.rewards import reward_pb2
from sage_grpo_jax.rewards.types import RewardResult


class Failure(NamedTuple):
    """Why a call gave no answer."""

    code: str
    message: str


class Call:
    """The clock and the attempts of one sample."""

    def __init__(self, budget: float) -> None:
        self._started = time.monotonic()
        self.budget = budget
        self.deadline = self._started + budget
        self.attempts = 0

    def seconds(self) -> float:
        """Since the sample was submitted."""
        return time.monotonic() - self._started

    def remaining(self) -> float:
        """Seconds of the budget that are left; negative once it is spent."""
        return self.deadline - time.monotonic()

    def failed(self, failure: Failure, fingerprint: str = "") -> RewardResult:
        """The result of a sample without scores."""
        return RewardResult(
            ok=False,
            code=failure.code,
            message=failure.message,
            fingerprint=fingerprint,
            seconds=self.seconds(),
            attempts=self.attempts,
        )


class Job(NamedTuple):
    """A sample that waits for a free thread."""

    future: futures.Future[RewardResult]
    call: Call
    request: reward_pb2.ScoreRequest
