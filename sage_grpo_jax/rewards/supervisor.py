"""A reward server that is started again, on its old address, whenever it dies or falls silent."""

import os
import threading
import time

import grpc
from absl import logging
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sage_grpo_jax.rewards import spawn

_POLL_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 30.0
# Asked one after the other over the silence that is allowed; none of them may be answered.
_PROBES = 5
# How a call ends that nobody answered; any other end is the word of a server that is alive.
_NO_ANSWER = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    )
)


class KeptServer:
    """Owns a spawned server and keeps it alive until closed; begins when the first one serves.

    A client that waits out an outage (within its budget) finds the new server on the same address,
    so that no rollout is lost. A server that keeps dying is started again after growing pauses. One
    whose process lives but answers no health check is killed first; a busy one answers them.

    Attributes:
      address: "127.0.0.1:PORT", constant.

    Args:
      backend, log_path: as for `spawn.spawn_server`.
      silence_seconds: without any answer until the server is killed; 0: it never is.

    Raises:
      RuntimeError: the first one does not come up; with the tail of its log.
    """

    def __init__(
        self,
        backend: str,
        log_path: str | os.PathLike | None = None,
        silence_seconds: float = 60.0,
    ) -> None:
        self._backend = backend
        self._log_path = log_path
        self._silence_seconds = silence_seconds
        self._closing = threading.Event()
        self._server = spawn.spawn_server(backend, log_path=log_path)
        self.address = self._server.address
        self._watch: SilenceWatch | None = None
        self._thread = threading.Thread(target=self._keep, name="reward-keeper", daemon=True)
        self._thread.start()

    def __enter__(self) -> "KeptServer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id of the server that runs now."""
        return self._server.process.pid

    def close(self) -> None:
        """Ends the server; it is not started again."""
        self._closing.set()
        # The keeper first: it might be starting another server at this moment.
        self._thread.join()
        self._end_watch()
        self._server.close()

    def _keep(self) -> None:
        pause = _POLL_SECONDS
        while not self._closing.wait(pause):
            try:
                if self._server.process.poll() is None:
                    self._listen()
                else:
                    self._start_again()
                pause = _POLL_SECONDS
            except Exception as error:
                # Also one that has nothing to do with the server (no memory, no disk): whatever
                # it is, it may pass, and nobody else would look after the server.
                if self._closing.is_set():
                    return
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                logging.warning(
                    "cannot keep the reward server on %s up, next try in %.1f s: %s",
                    *(self.address, pause, error),
                )

    def _listen(self) -> None:
        """Kills a server that has been silent for too long; the next look finds it dead."""
        if self._silence_seconds == 0:
            return
        if self._watch is None:
            self._watch = SilenceWatch(self.address, self._silence_seconds)
        if self._watch.is_silent():
            logging.warning(
                "the reward server (process %d) has answered none of %d probes in %g s: killing it",
                *(self.pid, _PROBES, self._silence_seconds),
            )
            self._end_watch()
            # Not asked to end: what answers nothing may not answer to SIGTERM either.
            self._server.process.kill()

    def _start_again(self) -> None:
        port = int(self.address.rpartition(":")[2])
        logging.warning(
            "the reward server ended with exit code %d; starting it again on port %d",
            self._server.process.returncode,
            port,
        )
        self._end_watch()
        # On the old port: clients that wait out the outage know no other.
        self._server = spawn.spawn_server(
            self._backend, port=port, log_path=self._log_path, cancelled=self._closing
        )

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


class SilenceWatch:
    """Notices that a server has answered nothing for a while; asks without blocking its caller.

    What it asks for is a health check: the server has threads of its own for these, so that one
    that scores for minutes still answers (unless its backend holds Python's global lock).

    Silence is counted in probes that were really sent, each followed by its share of the time, not
    read off a clock: a process that was itself stopped meanwhile would take its own absence for
    the server's.

    Args:
      address: "host:port".
      seconds: of silence, above 0.
    """

    def __init__(self, address: str, seconds: float) -> None:
        # The silence is cut into shares, with one probe at the beginning of each.
        self._seconds = seconds
        self._share = seconds / _PROBES

        options = (
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            # Its own pauses must not look like silence.
            ("grpc.max_reconnect_backoff_ms", 1000),
        )

        self._channel = grpc.insecure_channel(address, options)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._unanswered: list[grpc.Future] = []
        self._ask()

    def is_silent(self) -> bool:
        """Whether the last probes went unanswered; to be called several times in a share."""
        waited = time.monotonic() - self._asked
        # Far too late, this process was stopped or starved: what it waited for proves nothing.
        absent = waited > 2 * self._share + 1.0
        if absent or any(_answered(probe) for probe in self._unanswered):
            self._forget()

        if waited < self._share:
            return False
        silent = len(self._unanswered) >= _PROBES
        self._ask()
        return silent

    def close(self) -> None:
        """Ends the probes under way."""
        self._forget()
        self._channel.close()

    def _ask(self) -> None:
        # The clock of the share starts here, also when the last probe came late.
        self._asked = time.monotonic()
        # Late answers count too, so each probe may take the whole time.
        request = health_pb2.HealthCheckRequest()
        self._unanswered.append(self._stub.Check.future(request, timeout=self._seconds))

    def _forget(self) -> None:
        for probe in self._unanswered:
            probe.cancel()
        self._unanswered.clear()


def _answered(probe: grpc.Future) -> bool:
    return probe.done() and probe.code() not in _NO_ANSWER
