"""Asks a reward server for scores: several calls in flight, retries in a budget, typed results.

gRPC's own retries are off: they silently stop for messages above 256 KiB, and attempts would be
counted twice. A call that may succeed later (server away, queue full, too slow) is repeated with
jittered, growing pauses until the sample's budget is spent; any other failure is final. Scoring is
pure, so a repeated call is harmless.
"""

import logging
import math
import queue
import random
import threading
from collections.abc import Callable, Sequence
from concurrent import futures

import grpc
import numpy as np
from google.protobuf.message import Message

from sage_grpo_jax.rewards import reward_pb2, reward_pb2_grpc, types, wire
from sage_grpo_jax.rewards.calls import Call, Failure, Job
from sage_grpo_jax.rewards.outage import OutageLog
from sage_grpo_jax.rewards.types import RewardInfo, RewardResult, RewardServiceError

_log = logging.getLogger(__name__)

# The server's hint when to come back (server.py), a trailing metadata key.
_PUSHBACK_KEY = "retry-pushback-ms"
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 3.0
# CANCELLED: a server that stops cuts off what its grace period did not finish.
_RETRYABLE = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    )
)
# gRPC reports a message over the limit with the code of a full queue; only its text differs.
_TOO_LARGE = "larger than max"


class RewardClient:
    """Scores videos on one reward server.

    Connects at the first call, so it can be made before processes are forked. Safe to use from
    several threads. Use it as a context manager, or call `close`.

    Args:
      address: "host:port", or any gRPC target.
      timeout: seconds for one call.
      budget: seconds for one sample from `submit` to its result, waiting for a free call, retries
        and pauses included; what is not scored by then fails with the code of its last failure.
      max_in_flight: calls at the same time.
      reward_names: rewards wanted; () means all that the server has.
      optional_names: those of them that a sample may lack: where the backend fails, the others are
        asked for once more without these.
      expected_fingerprint: of the reward model, for instance from a checkpoint. Without one, the
        first answer sets it. Any other fingerprint afterwards fails with FAILED_PRECONDITION.
      max_message_bytes: limit of requests and answers.
      heartbeat: seconds between log lines while the server does not answer.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 60.0,
        budget: float = 900.0,
        max_in_flight: int = 8,
        reward_names: Sequence[str] = (),
        optional_names: Sequence[str] = (),
        expected_fingerprint: str = "",
        max_message_bytes: int = types.MAX_MESSAGE_BYTES,
        heartbeat: float = 5.0,
    ) -> None:
        for field, value in (("timeout", timeout), ("budget", budget), ("heartbeat", heartbeat)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field} = {value}: must be a finite number of seconds above 0")
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight = {max_in_flight}: must be at least 1")
        if optional_names and not set(optional_names) < set(reward_names):
            raise ValueError(
                f"optional_names = {list(optional_names)}: must be some of reward_names = "
                f"{list(reward_names)}, not all"
            )

        self._address = address
        self._timeout = timeout
        self._budget = budget
        self._max_in_flight = max_in_flight
        self._reward_names = tuple(reward_names)
        self._needed_names = tuple(n for n in reward_names if n not in optional_names)
        self._max_message_bytes = max_message_bytes
        self._fingerprint = expected_fingerprint

        # What the caller's threads and ours share.
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._channel: grpc.Channel | None = None
        self._stub: reward_pb2_grpc.RewardServiceStub | None = None
        self._outage = OutageLog(address, heartbeat)
        # Its own generator: pauses must not disturb anybody's seeded random numbers.
        self._random = random.Random()
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def fingerprint(self) -> str:
        """Of the reward model that all results come from; "" before the first answer."""
        return self._fingerprint

    def info(self, budget: float | None = None) -> RewardInfo:
        """What the server scores with; waits for it for `budget` seconds, None: that of a sample.

        Raises:
          RewardServiceError: it did not answer, or with another fingerprint than expected.
        """
        call = Call(self._budget if budget is None else budget)
        response = self._attempts(call, lambda stub: stub.GetInfo, reward_pb2.GetInfoRequest())
        if isinstance(response, Failure):
            raise RewardServiceError(response.code, f"{self._address}: {response.message}")
        if not self._same_fingerprint(response.fingerprint):
            raise RewardServiceError(types.FAILED_PRECONDITION, self._changed(response.fingerprint))
        return RewardInfo(
            fingerprint=response.fingerprint,
            names=tuple(response.reward_names),
            backend=response.backend,
            max_message_bytes=response.max_message_bytes,
            max_workers=response.max_workers,
            max_queue=response.max_queue,
        )

    def submit(
        self,
        video_uint8_FxHxWx3: np.ndarray,
        prompt: str,
        request_id: str,
        fps: float,
        *,
        frame_indices: Sequence[int] | None = None,
        total_frames: int | None = None,
    ) -> futures.Future[RewardResult]:
        """Starts scoring one video; the frames are copied, the caller may reuse them.

        Args:
          video_uint8_FxHxWx3: the frames that the backend looks at.
          prompt: the caption.
          request_id: names the sample in logs and answers, for instance "run/step/sample".
          fps: frames per second of the whole clip.
          frame_indices: which frames of the whole clip these are; None: all, in order.
          total_frames: length of the whole clip; None: that of the video.

        Returns:
          A future whose result is always a `RewardResult`; whatever went wrong is in its `code`.

        Raises:
          RuntimeError: the client is closed.
        """
        call = Call(self._budget)
        future: futures.Future[RewardResult] = futures.Future()

        # A bad clip fails alone and at once: no server would take it.
        try:
            request = wire.make_request(
                video_uint8_FxHxWx3,
                prompt,
                request_id,
                fps,
                reward_names=self._reward_names,
                frame_indices=frame_indices,
                total_frames=total_frames,
            )
        except ValueError as error:
            future.set_result(call.failed(Failure(types.INVALID_ARGUMENT, str(error))))
            return future

        # One lock with `close`: a job is refused, or stands before the end marks of the threads.
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("submit after close: the reward client takes no more videos")
            self._start_threads()
            self._waiting.put(Job(future, call, request))
        return future

    def close(self) -> None:
        """Ends calls in flight (their results say CANCELLED) and waits for the threads."""
        with self._lock:
            self._closed.set()
            if self._channel is not None:
                self._channel.close()
            threads, self._threads = self._threads, []
        # Behind the jobs that wait, which the threads take first and end as CANCELLED.
        for _ in threads:
            self._waiting.put(None)
        for thread in threads:
            thread.join()

    def _start_threads(self) -> None:
        # Daemons, unlike an executor's threads: a program that ends in an error does not first wait
        # for a server that is away.
        while len(self._threads) < self._max_in_flight:
            thread = threading.Thread(target=self._work, name="reward-client", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(self._score(job.call, job.request))

    def _score(self, call: Call, request: reward_pb2.ScoreRequest) -> RewardResult:
        try:
            size = request.ByteSize()
            if size > self._max_message_bytes:
                limit = f"at most {self._max_message_bytes} are allowed"
                failure = Failure(types.INVALID_ARGUMENT, f"request has {size} bytes: {limit}")
                return call.failed(failure)

            result = self._ask(call, request)
            # One reward that fails takes the whole answer with it, the needed ones too.
            if result.code == types.INTERNAL and self._needed_names != self._reward_names:
                _log.warning(
                    "%s: %s; asking without the rewards that are optional",
                    request.request_id,
                    result.message,
                )
                request.reward_names[:] = self._needed_names
                request.digest = wire.request_digest(request)
                result = self._ask(call, request)
            return result
        except Exception as error:
            # The promise to the caller: a sample fails, the step goes on. Never silently.
            _log.exception("scoring %s failed in the client", request.request_id)
            return call.failed(Failure(types.INTERNAL, f"client: {type(error).__name__}: {error}"))

    def _ask(self, call: Call, request: reward_pb2.ScoreRequest) -> RewardResult:
        request.expected_fingerprint = self._fingerprint
        response = self._attempts(call, lambda stub: stub.Score, request)
        if isinstance(response, Failure):
            return call.failed(response)
        return self._result(call, request, response)

    def _result(
        self, call: Call, request: reward_pb2.ScoreRequest, response: reward_pb2.ScoreResponse
    ) -> RewardResult:
        failure = self._check_answer(request, response)
        if failure is not None:
            return call.failed(failure, response.fingerprint)
        return RewardResult(
            ok=True,
            code=types.OK,
            scores={reward.name: reward.normalised for reward in response.rewards},
            raw={reward.name: reward.raw for reward in response.rewards},
            fingerprint=response.fingerprint,
            seconds=call.seconds(),
            server_seconds=response.timings.score_seconds,
            attempts=call.attempts,
            warnings=tuple(response.warnings),
        )

    def _check_answer(
        self, request: reward_pb2.ScoreRequest, response: reward_pb2.ScoreResponse
    ) -> Failure | None:
        """An answer counts only if it is to this request, by the pinned model, and has numbers."""
        if response.request_id != request.request_id:
            return Failure(
                types.DATA_LOSS,
                f"answer to {response.request_id!r} received for {request.request_id!r}",
            )
        if response.digest != request.digest:
            return Failure(types.DATA_LOSS, "answer with the digest of another video")
        if not self._same_fingerprint(response.fingerprint):
            return Failure(types.FAILED_PRECONDITION, self._changed(response.fingerprint))
        if response.status.code:
            return Failure(_code_name(response.status.code), response.status.message)
        names = [reward.name for reward in response.rewards]
        if not names or (request.reward_names and names != list(request.reward_names)):
            wanted = list(request.reward_names) or "all"
            return Failure(types.DATA_LOSS, f"answer with rewards {names}, wanted were {wanted}")
        for reward in response.rewards:
            if not (math.isfinite(reward.raw) and math.isfinite(reward.normalised)):
                return Failure(types.INTERNAL, f"{reward.name} = {reward.normalised}: not finite")
        return None

    def _same_fingerprint(self, fingerprint: str) -> bool:
        with self._lock:
            # Without an expected one, the first answer to any thread decides.
            self._fingerprint = self._fingerprint or fingerprint
            return fingerprint == self._fingerprint and fingerprint != ""

    def _changed(self, fingerprint: str) -> str:
        return (
            f"the reward model at {self._address} has the fingerprint {fingerprint!r}, "
            f"expected was {self._fingerprint!r}"
        )

    def _attempts(self, call: Call, method: Callable, request: Message) -> Message | Failure:
        """Calls until there is an answer, a final failure, or no budget; returns either."""
        failure = None
        with self._outage.watching(call.deadline):
            while (remaining := call.remaining()) > 0:
                call.attempts += 1
                timeout = min(self._timeout, remaining)
                answer, retry, pushback = self._attempt(method, request, timeout)

                if self._closed.is_set():
                    return Failure(types.CANCELLED, "the client was closed")
                if not isinstance(answer, Failure):
                    self._outage.answered()
                    return answer
                if not retry:
                    return answer
                if answer.code == types.DEADLINE_EXCEEDED and timeout < self._timeout:
                    # Cut short by the budget: it says less than what failed before.
                    break

                # `close` ends the pause; it never goes beyond the budget.
                failure = answer
                self._outage.failed(*failure)
                pause = self._pause(call.attempts, pushback)
                self._closed.wait(min(pause, max(0.0, call.remaining())))

        # A call that only ever waited tells what the others have met.
        code, message = (
            failure or self._outage.last or (types.DEADLINE_EXCEEDED, "no answer, no failure")
        )
        spent = f"gave up after {call.attempts} attempts in {call.budget:g} s"
        return Failure(code, f"{spent}; last: {message}")

    def _attempt(
        self, method: Callable, request: Message, timeout: float
    ) -> tuple[Message | Failure, bool, float]:
        """One call: the answer or a failure, whether to retry, the pause that the server wants."""
        try:
            return method(self._connect())(request, timeout=timeout), False, 0.0
        except grpc.RpcError as error:
            return _classify(error)
        except ValueError as error:
            # gRPC's way to say that `close` came between.
            if not self._closed.is_set():
                raise
            return Failure(types.CANCELLED, str(error)), False, 0.0

    def _pause(self, attempts: int, pushback: float) -> float:
        # The exponent is capped, as an outage of hours would overflow it. The jitter keeps clients
        # that failed together from coming back together.
        doubled = _FIRST_PAUSE * 2.0 ** min(attempts - 1, 16)
        return max(pushback, min(doubled, _LONGEST_PAUSE)) * self._random.uniform(0.5, 1.5)

    def _connect(self) -> reward_pb2_grpc.RewardServiceStub:
        with self._lock:
            if self._closed.is_set():
                raise ValueError("the client is closed")
            if self._stub is None:
                self._channel = grpc.insecure_channel(self._address, self._channel_options())
                self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)
            return self._stub

    def _channel_options(self) -> tuple[tuple[str, int], ...]:
        return (
            ("grpc.max_send_message_length", self._max_message_bytes),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
            # A connection of its own: another client's pauses are not ours.
            ("grpc.use_local_subchannel_pool", 1),
            # A server that returns is found within about a second, not two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 5000),  # the time that one connection may take
            ("grpc.max_reconnect_backoff_ms", 1000),
            # A machine that vanished says nothing: only an unanswered ping (in ms) tells of it.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        )


def _classify(error: grpc.RpcError) -> tuple[Failure, bool, float]:
    """The failure, whether another attempt may help, and seconds that the server asks to wait."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details:
        return Failure(types.INVALID_ARGUMENT, details), False, 0.0
    pushback = 0.0
    for key, value in error.trailing_metadata() or ():
        if key == _PUSHBACK_KEY and value.isdigit():
            pushback = int(value) / 1000.0
    return Failure(code.name, details), code in _RETRYABLE, pushback


def _code_name(code: int) -> str:
    for status in grpc.StatusCode:
        if status.value[0] == code:
            return status.name
    return grpc.StatusCode.UNKNOWN.name
