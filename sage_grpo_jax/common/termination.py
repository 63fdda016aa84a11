"""Ends a process at a signal, from any of its moments, with nothing half-made left behind.

A handler that raises (SystemExit, KeyboardInterrupt) is not heard everywhere: Python drops what is
raised while it runs a callback of the garbage collector (JAX has one), a destructor or a callback
from C, and libraries catch everything here and there. So nothing is raised here. Whoever makes
something half says how to undo it (`on_stop`), whoever must not be cut in two says so
(`uninterrupted`), and the handler undoes what there is to undo and ends the process where it
stands, with the status that a shell shows for the signal: 128 + its number.

Python calls handlers in the main thread and between two of its instructions only. Where the main
thread is inside a long call of a library, a second thread, which the system tells of the signal at
once, does the same after a moment.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# What asks a process to end: a scheduler, the keyboard, a terminal that is closed.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
# How long the main thread has to answer by itself.
_MAIN_THREAD_SECONDS = 1.0

# Held by who must not be cut in two; and, once the process ends, by who ends it, for good.
_lock = threading.RLock()
_holders: list[int] = []  # the thread with the lock, once for each of its blocks of `uninterrupted`
_asked: int | None = None  # the signal that waits for the end of these blocks
_ended_by: int | None = None  # the thread that ends the process
_undo: dict[int, Callable[[], object]] = {}
_numbers = itertools.count()
_read_end: int | None = None


def install() -> None:
    """Makes the process end as described; for entries, in the main thread. Again: no change.

    Signals that are ignored (SIGHUP under nohup) stay ignored. A handler that is set later takes
    precedence while it is set.
    """
    global _read_end
    if _read_end is None:
        _read_end, write_end = os.pipe()
        # Python writes the number of each signal into the pipe, whatever the main thread is doing;
        # the second thread reads it there.
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=_watch, args=(_read_end,), name="signals", daemon=True).start()
    for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _handle)


def renew() -> None:
    """Takes signals back, where they were taken by `install`, from a library that took them too.

    `jax.distributed` hands SIGTERM to a service of its own, behind the back of Python.
    """
    if _read_end is not None:
        install()


@contextlib.contextmanager
def on_stop(undo: Callable[[], object]) -> Iterator[None]:
    """Calls `undo` if the process is ended in this block; it must bear to be called at any moment.

    It runs in the middle of other code: system calls only, nothing that waits for a lock.
    """
    number = next(_numbers)
    _undo[number] = undo
    try:
        yield
    finally:
        del _undo[number]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal in this block ends the process after it. For short blocks."""
    with _lock:
        _holders.append(threading.get_ident())
        try:
            yield
        finally:
            _holders.pop()
            if _asked is not None and not _holders:
                _end(_asked)


def _handle(number: int, frame: FrameType | None) -> None:
    """The handler, in the main thread."""
    global _asked
    here = threading.get_ident()
    # In a block that must not be cut the signal waits for its end; while the process ends, a second
    # one changes nothing.
    if here in _holders or here == _ended_by:
        _asked = number
        return
    _end(number)


def _watch(read_end: int) -> None:
    """Ends the process where the main thread does not come to it."""
    # Each signal is one byte, its number.
    while data := os.read(read_end, 1):
        number = data[0]
        # While an entry saves and stops by itself, the handler is its own.
        if signal.getsignal(number) is _handle:
            time.sleep(_MAIN_THREAD_SECONDS)
            _end(number)


def _end(number: int) -> NoReturn:
    global _ended_by
    _lock.acquire()  # never released: whoever waits for it is not needed any more
    _ended_by = threading.get_ident()
    # The newest comes first: what was begun later may lie inside of what was begun before.
    for undo in reversed(list(_undo.values())):
        try:
            undo()
        except Exception as error:  # the others have to be undone too
            _say(f"while stopping: {error}")
    _say(f"stopped: {signal.Signals(number).name}")
    # sys.exit could be caught, and would let libraries clean up while their threads still run.
    os._exit(128 + number)


def _say(text: str) -> None:
    """Writes a line to standard error past Python's buffers, which another thread may hold."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = sys.stderr.fileno()
        start = "\n" if os.isatty(descriptor) else ""  # a bar of progress has no end of line
        os.write(descriptor, f"{start}{text}\n".encode())


def _forget() -> None:
    """In a process that was forked: what is to be undone belongs to the parent."""
    global _read_end
    _undo.clear()
    _read_end = None
    signal.set_wakeup_fd(-1)
    for name in _NAMES:
        if signal.getsignal(getattr(signal, name)) is _handle:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
