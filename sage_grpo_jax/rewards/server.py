"""Serves a backend: checks requests, queues a bounded number, scores several at a time.

Threads: one gRPC handler per accepted call waits for its turn in a pool of `max_workers` scoring
threads. More than `max_workers + max_queue` accepted calls are answered RESOURCE_EXHAUSTED with a
hint when to come back, so memory stays bounded and clients slow down.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import NoReturn

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sage_grpo_jax.rewards import reward_pb2, reward_pb2_grpc, types, wire
from sage_grpo_jax.rewards.backends.base import Backend, BackendLostError, check_scores

_log = logging.getLogger(__name__)

PUSHBACK_KEY = "retry-pushback-ms"
_PUSHBACK_MS = 100
# Handlers kept free for GetInfo and health checks while every scoring call waits.
_SPARE_HANDLERS = 4
_MAX_ERROR_TEXT = 500
_INTERNAL = grpc.StatusCode.INTERNAL.value[0]


class RewardServer:
    """One backend on one port.

    `start` binds and answers health checks with NOT_SERVING; `warm_up` makes it serve; `stop`
    drains. The `lost` event is set when the backend raised `BackendLostError`: the owner should
    stop the server and exit with an error.

    Args:
      backend: what to serve.
      name: of the backend, for `GetInfo`.
      host, port: where to listen; port 0 chooses a free one. The traffic is neither encrypted nor
        authenticated: a loopback address, or a private network.
      max_workers: clips scored at the same time.
      max_queue: clips waiting.
      max_message_bytes: limit of requests and answers.
      cache_size: finished answers kept, so that a retried request is not scored again.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        name: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        max_workers: int = 2,
        max_queue: int = 64,
        max_message_bytes: int = types.MAX_MESSAGE_BYTES,
        cache_size: int = 256,
    ) -> None:
        _require("port", port, 0, 65535)
        _require("max_workers", max_workers, 1, 1024)
        _require("max_queue", max_queue, 0, 65536)
        _require("max_message_bytes", max_message_bytes, 1024, 2**31 - 1)
        _require("cache_size", cache_size, 0, 2**20)

        # Until the warm-up is over, health checks are answered and calls are turned away.
        self.lost = threading.Event()
        self.address = ""
        # An IPv6 address needs brackets in front of its port.
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._backend = backend
        self._health = health.HealthServicer()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

        # A handler only waits for its scoring thread, so there is one for every accepted call.
        self._service = _Service(
            backend, name, max_workers, max_queue, max_message_bytes, cache_size, self._on_lost
        )
        capacity = max_workers + max_queue
        handlers = futures.ThreadPoolExecutor(
            capacity + _SPARE_HANDLERS, thread_name_prefix="reward-handler"
        )
        self._server = grpc.server(
            handlers,
            # Calls over the handlers' number would wait, with their frames, where nothing counts.
            maximum_concurrent_rpcs=capacity + 2 * _SPARE_HANDLERS,
            options=(
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                # A second server on the port fails instead of taking half of the calls.
                ("grpc.so_reuseport", 0),
                # Less than the client's keepalive interval, else it is sent away.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ),
        )

        reward_pb2_grpc.add_RewardServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    @property
    def fingerprint(self) -> str:
        return self._service.fingerprint

    @property
    def counts(self) -> dict[str, int]:
        """Calls of `Score` by outcome."""
        return dict(self._service.counts)

    def start(self) -> str:
        """Binds and listens, not yet ready to score; returns "host:port".

        Raises:
          RuntimeError: the port is taken, or the host is not one of this machine.
        """
        try:
            port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise RuntimeError(f"cannot listen on {self._host}:{self._port}: {error}") from error
        self._server.start()
        self.address = f"{self._host}:{port}"
        return self.address

    def warm_up(self) -> None:
        """Runs the backend's warm-up and then starts to serve; its errors pass through."""
        self._backend.warm_up()
        self._service.ready.set()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float = 10.0) -> bool:
        """Turns new calls away (UNAVAILABLE) and finishes accepted ones for `grace` seconds.

        Returns:
          Whether all accepted calls were answered and every scoring thread is idle.
        """
        # First of all, so that whoever looks at the health sends nothing more.
        self._health.enter_graceful_shutdown()
        deadline = time.monotonic() + grace
        self._server.stop(grace).wait()
        # gRPC waits for handlers only; what is left of the time goes to the scoring threads.
        return self._service.close(max(0.0, deadline - time.monotonic()))

    def _on_lost(self) -> None:
        self._service.ready.clear()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.lost.set()

    def _set_health(self, status: int) -> None:
        for service in ("", types.SERVICE_NAME):
            self._health.set(service, status)


class _Service(reward_pb2_grpc.RewardServiceServicer):
    """The calls of reward.proto."""

    def __init__(
        self,
        backend: Backend,
        name: str,
        max_workers: int,
        max_queue: int,
        max_message_bytes: int,
        cache_size: int,
        on_lost: Callable[[], None],
    ) -> None:
        self.ready = threading.Event()
        self.fingerprint = backend.fingerprint()
        self.counts = collections.Counter()

        self._backend = backend
        self._on_lost = on_lost
        self._info = reward_pb2.GetInfoResponse(
            fingerprint=self.fingerprint,
            backend=name,
            reward_names=backend.names,
            max_message_bytes=max_message_bytes,
            max_workers=max_workers,
            max_queue=max_queue,
        )

        # A clip that waits holds its frames in memory: their number is what bounds it.
        self._cache = _Cache(cache_size)
        self._slots = threading.BoundedSemaphore(max_workers + max_queue)
        self._workers = futures.ThreadPoolExecutor(max_workers, thread_name_prefix="reward-scorer")

        self._lock = threading.Lock()
        self._running = 0

    def GetInfo(
        self, request: reward_pb2.GetInfoRequest, context: grpc.ServicerContext
    ) -> reward_pb2.GetInfoResponse:
        del request
        self._require_ready(context)
        return self._info

    def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        received = time.monotonic()
        # Nothing of a request is believed, or looked up, before it was checked.
        self._check(request, context)
        response = self._cache.get(request.digest)
        if response is None:
            response = self._score_in_turn(request, context, received)
        # A cached answer was made for a request with another name.
        response.request_id = request.request_id
        response.timings.total_seconds = time.monotonic() - received
        self._count("INTERNAL" if response.status.code else "OK")
        return response

    def close(self, timeout: float) -> bool:
        """Drops what is queued and waits for the scoring threads; whether they ended in time."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        # A thread inside a backend cannot be ended; one that hangs is reported to the caller.
        deadline = time.monotonic() + timeout
        while self._running and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._running == 0

    def _check(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        self._require_ready(context)
        # A client that has pinned another model must not get scores of this one.
        if request.expected_fingerprint not in ("", self.fingerprint):
            self._refuse(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the fingerprint here is {self.fingerprint}, expected was "
                f"{request.expected_fingerprint[:200]!r}",
            )

        try:
            wire.check_request(
                request, self._backend.names, self._backend.limits, self._backend.frame_indices
            )
        except ValueError as error:
            self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _score_in_turn(
        self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext, received: float
    ) -> reward_pb2.ScoreResponse:
        # Never waits for a slot: a full server must answer, and not keep the frames.
        if not self._slots.acquire(blocking=False):
            context.set_trailing_metadata(((PUSHBACK_KEY, str(_PUSHBACK_MS)),))
            self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")

        try:
            response = self._workers.submit(self._score, request, context, received).result()
        except (BackendLostError, futures.CancelledError, RuntimeError) as error:
            # RuntimeError: the pool takes nothing any more.
            self._refuse(context, grpc.StatusCode.UNAVAILABLE, f"stopping: {_describe(error)}")
        finally:
            self._slots.release()

        if response is None:
            self._refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "nobody waits for this score")
        # A failure is not kept: the next attempt may succeed.
        if not response.status.code:
            self._cache.put(request.digest, response)
        return response

    def _score(
        self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext, received: float
    ) -> reward_pb2.ScoreResponse | None:
        """Runs in a scoring thread; None if the caller has gone while this waited."""
        # Skip what nobody waits for, or nobody can score.
        if not context.is_active():
            return None
        if not self.ready.is_set():
            raise BackendLostError("the backend was lost while this waited")

        # Score, counted so that `close` knows when all threads are idle.
        started = time.monotonic()
        response = reward_pb2.ScoreResponse(digest=request.digest, fingerprint=self.fingerprint)
        with self._lock:
            self._running += 1
        try:
            self._fill(response, request)
        except BackendLostError:
            _log.exception("the backend is lost")
            self._on_lost()
            raise
        except Exception as error:
            # Anything a backend raises is about this clip; the next one may be fine.
            _log.exception("scoring %s failed", request.request_id)
            response.status.code = _INTERNAL
            response.status.message = _describe(error)
        finally:
            with self._lock:
                self._running -= 1

        response.timings.queue_seconds = started - received
        response.timings.score_seconds = time.monotonic() - started
        return response

    def _fill(self, response: reward_pb2.ScoreResponse, request: reward_pb2.ScoreRequest) -> None:
        # What a client gets is checked here too: a backend may be anybody's code.
        video = wire.read_frames(request.frames)
        scores = self._backend.score(video, request.prompt, request.frames.source_fps)
        wanted = tuple(request.reward_names) or self._backend.names
        check_scores(self._backend.names, scores, wanted)

        # A clip that stands still is scored, but is more likely a fault of whoever made it.
        if all(np.array_equal(video[0], frame) for frame in video[1:]):
            plain = (video[0] == video[0, 0, 0]).all()
            thing = "pixels have the same colour" if plain else "frames are the same"
            response.warnings.append(f"all {thing}")

        for name in wanted:
            raw, normalised = scores[name]
            response.rewards.add(name=name, raw=raw, normalised=normalised)

    def _require_ready(self, context: grpc.ServicerContext) -> None:
        if not self.ready.is_set():
            self._refuse(context, grpc.StatusCode.UNAVAILABLE, "not ready: warming up or stopping")

    def _refuse(
        self, context: grpc.ServicerContext, code: grpc.StatusCode, message: str
    ) -> NoReturn:
        self._count(code.name)
        context.abort(code, message)
        raise AssertionError("unreachable: abort raises")

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.counts[outcome] += 1


class _Cache:
    """The most recent answers by digest; scoring is pure, so a repeated request needs no work."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        # As bytes: what is handed out is a copy, which the caller fills in.
        self._answers: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()

    def get(self, digest: bytes) -> reward_pb2.ScoreResponse | None:
        with self._lock:
            answer = self._answers.get(digest)
            if answer is None:
                return None
            # The one that was asked for last leaves last.
            self._answers.move_to_end(digest)
        response = reward_pb2.ScoreResponse.FromString(answer)
        response.timings.Clear()
        return response

    def put(self, digest: bytes, response: reward_pb2.ScoreResponse) -> None:
        with self._lock:
            self._answers[digest] = response.SerializeToString()
            while len(self._answers) > self._size:
                self._answers.popitem(last=False)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_ERROR_TEXT]


def _require(field: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{field} = {value}: must be from {lowest} to {highest}")
