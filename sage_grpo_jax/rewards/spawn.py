"""A reward server owned by the program that uses it: both ends of the parent-child tie.

`spawn_server` runs in the parent, `die_with_parent` in the child. The child must not outlive its
parent, even one killed by SIGKILL, which can tidy nothing up. So the child watches: it compares
`getppid()` every half second (any POSIX system), and on Linux the kernel also sends it a signal
when the parent ends. That signal (prctl PR_SET_PDEATHSIG) really belongs to the parent's *thread*
that started the child, so it only makes the child look at `getppid()` at once.
"""

import contextlib
import ctypes
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

_PACKAGE_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LISTENING = re.compile(r"^listening on (?P<address>\S+) fingerprint (?P<fingerprint>\S+)$")
_PR_SET_PDEATHSIG = 1
# Of the log, in a message: enough for a traceback.
_TAIL_BYTES = 4000
_CANCEL_POLL_SECONDS = 0.2


def listening_line(address: str, fingerprint: str) -> str:
    """What a server prints when it serves; `spawn_server` waits for it."""
    return f"listening on {address} fingerprint {fingerprint}"


class SpawnedServer:
    """A running server.

    Attributes:
      address: "127.0.0.1:PORT".
      fingerprint: of its reward model.
      process: the child.
      log_path: its standard error.
    """

    def __init__(
        self, address: str, fingerprint: str, process: subprocess.Popen, log: "_Log"
    ) -> None:
        self.address = address
        self.fingerprint = fingerprint
        self.process = process
        self.log_path = log.path
        self._log = log

    def __enter__(self) -> "SpawnedServer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self, grace: float = 10.0) -> None:
        """Asks the server to stop, kills it after `grace` seconds; may be called again."""
        _end(self.process, grace)
        self._log.discard_if_temporary()


def spawn_server(
    backend: str,
    *,
    port: int = 0,
    log_path: str | os.PathLike | None = None,
    startup_timeout: float = 120.0,
    extra_args: Sequence[str] = (),
    env: dict[str, str] | None = None,
    cancelled: threading.Event | None = None,
) -> SpawnedServer:
    """Starts `python -m sage_grpo_jax.serve_rewards` on loopback and waits until it serves.

    Args:
      backend: as for `--backend`.
      port: 0 chooses a free one; another one is for a server that returns to its old address.
      log_path: file that its standard error is appended to; None: a temporary one.
      startup_timeout: seconds for imports, loading and warm-up.
      extra_args: more flags.
      env: environment variables in addition to this process's own.
      cancelled: gives up waiting, and ends the server, when it is set.

    Raises:
      RuntimeError: it ended, was cancelled or took too long before it served; with the tail of its
        log.
    """
    # What the child is started with. It finds this package also where that is not installed.
    log = _Log(log_path)
    command = [sys.executable, "-m", "sage_grpo_jax.serve_rewards"]
    command += [f"--backend={backend}", f"--port={port}", f"--parent_pid={os.getpid()}"]
    variables = {**os.environ, **(env or {})}
    paths = [str(_PACKAGE_ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    # The child writes to a copy of the log's handle; ours is closed when it has started.
    with log.open() as stderr:
        process = subprocess.Popen(
            [*command, *extra_args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=variables,
            # Ctrl-C in a terminal reaches the trainer only, which may still need scores to save
            # its step; it closes the server itself.
            start_new_session=True,
        )

    # Its first line comes through a thread, since reading a pipe cannot be given a timeout.
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(
        target=_read_lines, args=(process.stdout, lines), name="reward-stdout", daemon=True
    ).start()

    try:
        address, fingerprint = _wait_until_listening(lines, startup_timeout, cancelled)
    # Also Ctrl-C: a child that nobody owns must not stay behind.
    except BaseException as error:
        _end(process, grace=1.0)
        tail = log.tail()
        log.discard_if_temporary()
        if not isinstance(error, _NotServingError):
            raise
        raise RuntimeError(
            f"the reward server with backend {backend!r} {error} (exit code "
            f"{process.returncode}); the end of its log:\n{tail}"
        ) from None
    return SpawnedServer(address, fingerprint, process, log)


def die_with_parent(parent_pid: int) -> None:
    """Ends this process at once when the process `parent_pid` is no longer its parent.

    Call it first thing in the child's main thread.

    Raises:
      ValueError: `parent_pid` is not a process id.
    """
    # The first process of a container has the id 1; when it ends, the kernel ends all others.
    if parent_pid < 1:
        raise ValueError(f"parent_pid = {parent_pid}: must be the id of the parent process")

    def check(*unused: object) -> None:
        # An orphan is given to another process, so this differs from then on.
        if os.getppid() != parent_pid:
            # Nobody is left to read answers, and other threads may never finish.
            os._exit(1)

    if sys.platform == "linux":
        signal.signal(signal.SIGUSR1, check)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGUSR1), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # After the signal is set, so that a parent that ended in between is noticed here.
    check()

    def watch() -> None:
        while True:
            time.sleep(0.5)
            check()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class _NotServingError(Exception):
    """The child ended or was too slow."""


class _Log:
    """The child's standard error; remembers where this child's part begins."""

    def __init__(self, path: str | os.PathLike | None) -> None:
        self._temporary = path is None
        if path is None:
            handle, path = tempfile.mkstemp(prefix="reward_server_", suffix=".log")
            os.close(handle)
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._begin = self.path.stat().st_size if self.path.exists() else 0

    def open(self) -> IO[bytes]:
        return self.path.open("ab")

    def tail(self) -> str:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # Earlier servers have written to the same file: their part is not shown.
            file.seek(max(self._begin, size - _TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or "(empty)"

    def discard_if_temporary(self) -> None:
        if self._temporary:
            self.path.unlink(missing_ok=True)


def _read_lines(stdout: IO[str], lines: queue.SimpleQueue) -> None:
    # Reads on after the first line, so that a child that prints more is never blocked.
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)


def _wait_until_listening(
    lines: queue.SimpleQueue, timeout: float, cancelled: threading.Event | None
) -> tuple[str, str]:
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            # In short waits, so that a cancellation is noticed.
            line = lines.get(timeout=max(0.0, min(left, _CANCEL_POLL_SECONDS)))
        except queue.Empty:
            if cancelled is not None and cancelled.is_set():
                raise _NotServingError("was not waited for any more") from None
            if left > 0:
                continue
            raise _NotServingError(f"did not serve within {timeout:g} s") from None
        if line is None:
            raise _NotServingError("ended before it served")
        # Other lines are what a backend's libraries print while they load.
        match = _LISTENING.match(line.strip())
        if match:
            return match["address"], match["fingerprint"]


def _end(process: subprocess.Popen, grace: float) -> None:
    # SIGTERM lets the server finish what it has accepted; it may have ended by itself.
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
