"""Serves a reward model over gRPC: `python -m sage_grpo_jax.serve_rewards --backend NAME --port N`.

Prints one line to standard output when it is ready to score:

    listening on 127.0.0.1:50051 fingerprint 5f0c...

SIGTERM and SIGINT finish the accepted calls and end it.
"""

import ipaddress
import logging
import os
import signal
import sys
import threading

from absl import flags

from sage_grpo_jax.common import command_line
from sage_grpo_jax.rewards import backends, spawn, types
from sage_grpo_jax.rewards.server import RewardServer

_BACKEND = flags.DEFINE_string(
    "backend",
    None,
    f"Reward model: {', '.join(sorted(backends.BACKENDS))}, or package.module:Class.",
    required=True,
)
_PORT = flags.DEFINE_integer("port", 50051, "Port; 0 chooses a free one.", 0, 65535)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_ALLOW_INSECURE = flags.DEFINE_bool(
    "allow_insecure",
    False,
    "Allow a --host other than loopback. Traffic is neither encrypted nor authenticated: only for "
    "private networks.",
)
_MAX_WORKERS = flags.DEFINE_integer("max_workers", 2, "Videos scored at the same time.", 1)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 64, "Videos waiting before more are turned away.", 0)
_MAX_MESSAGE_MIB = flags.DEFINE_integer(
    "max_message_mib", types.MAX_MESSAGE_BYTES // 2**20, "Limit of one message, MiB.", 1, 2047
)
_CACHE_SIZE = flags.DEFINE_integer(
    "cache_size", 256, "Answers kept, so that a retried video is not scored again.", 0
)
_GRACE = flags.DEFINE_float("grace", 10.0, "Seconds for accepted calls after SIGTERM.", 0.0)
_PARENT_PID = flags.DEFINE_integer(
    "parent_pid", None, "End at once when this process is no longer the parent."
)

_log = logging.getLogger(__name__)


def main() -> None:
    """Serves until a signal, or until the backend is lost."""
    # First of all: while a model loads, the parent may end as well.
    if _PARENT_PID.value is not None:
        spawn.die_with_parent(_PARENT_PID.value)
    _check_host(_HOST.value)

    server = RewardServer(
        backends.create(_BACKEND.value),
        name=_BACKEND.value,
        host=_HOST.value,
        port=_PORT.value,
        max_workers=_MAX_WORKERS.value,
        max_queue=_MAX_QUEUE.value,
        max_message_bytes=_MAX_MESSAGE_MIB.value * 2**20,
        cache_size=_CACHE_SIZE.value,
    )

    # Listens before the long warm-up: a port that is taken is told at once.
    try:
        address = server.start()
    except RuntimeError as error:
        raise ValueError(f"--port: {error}; allowed: a free one, or 0") from error

    try:
        server.warm_up()
    except Exception:
        _log.exception("the warm-up of backend %s failed", _BACKEND.value)
        server.stop(0.0)
        sys.exit(1)

    # Before the line is out: whoever reads it may send a signal at once.
    stop = _stop_on_signals()
    print(spawn.listening_line(address, server.fingerprint), flush=True)

    # gRPC's threads serve; this one waits for a signal, and looks for a backend that is lost.
    while not stop.wait(0.2) and not server.lost.is_set():
        pass

    # All that was accepted is answered, or the exit status says that it was not.
    drained = server.stop(_GRACE.value)
    _log.info("stopped; calls by outcome: %s", server.counts)
    if server.lost.is_set() or not drained:
        _log.error("backend lost" if server.lost.is_set() else "a call did not end in time")
        logging.shutdown()
        # A scoring thread may hang for ever; a normal exit would wait for it.
        os._exit(1)


def _check_host(host: str) -> None:
    # Names other than "localhost" may lead anywhere, whatever they lead to now.
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not _ALLOW_INSECURE.value:
        raise ValueError(
            f"--host = {host}: allowed are loopback addresses, or any with --allow_insecure, since "
            "the traffic is neither encrypted nor authenticated"
        )


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *unused: stop.set())
    return stop


if __name__ == "__main__":
    command_line.run(main, verbosity=None)
