"""Files that are there whole or not at all, and what a disk says when it fails."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import re
import socket

from sage_grpo_jax.common import termination

TEMPORARY = "sage_grpo_jax_tmp"
# What the world does to a good command: no room, a quota, a limit, a broken disk.
_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_WORDS = tuple(os.strerror(number) for number in _FAILURES)


class StorageError(RuntimeError):
    """The disk is full or broken; nothing half-written is left under a final name."""


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes to a temporary name, then renames: a reader sees the old file or the new one.

    A symbolic link is followed: the file that it leads to is written.
    """
    path = real_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path, TEMPORARY)
    remove = functools.partial(temporary.unlink, missing_ok=True)
    # Whether an error or a signal ends this, nothing is left under the temporary name.
    with termination.on_stop(remove):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                # The data goes to disk before the rename: after a crash the new name must not lead
                # to an empty file.
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            remove()


def real_path(path: str | os.PathLike) -> pathlib.Path:
    """Where a path leads: absolute, without `..` and symbolic links.

    Orbax and tensorstore take no path with `..`, and what is written beside the target of a link
    lies on the disk of the target.
    """
    return pathlib.Path(os.path.realpath(path))


def temporary_path(path: pathlib.Path, kind: str) -> pathlib.Path:
    """A hidden name beside `path` that tells whose it is: one for each process, path and kind."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{kind}")


def left_by_dead(path: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """The temporaries of a path that processes of this host left behind that are no more."""
    return [left for left, name in _temporaries(path.parent, kind) if name == path.name]


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes the temporary files in a folder of writes that were cut off."""
    if folder.is_dir():
        for left, _ in _temporaries(folder, TEMPORARY):
            left.unlink(missing_ok=True)


def _temporaries(folder: pathlib.Path, kind: str) -> list[tuple[pathlib.Path, str]]:
    """(path, name that it stands for) of what dead processes of this host left."""
    host = re.escape(socket.gethostname())
    # Host and process are in the name: what a living process writes is left alone, and what another
    # host wrote cannot be judged from here.
    pattern = re.compile(rf"\.(.+)\.{host}\.([0-9]{{1,10}})\.{kind}", re.DOTALL)
    found = []
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        # One of this very process is of an earlier one with its number.
        if match and (int(match[2]) == os.getpid() or not _runs(int(match[2]))):
            found.append((path, match[1]))
    return found


def _runs(pid: int) -> bool:
    try:
        # Signal 0 is not sent; it only tells whether there is such a process.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def sync(path: pathlib.Path) -> None:
    """Returns when a file or folder is on disk; for a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_failure(error: BaseException) -> str | None:
    """What the system said, in a few words, where an error comes from a full or broken disk.

    Libraries put these words into errors of their own, beside much else.
    """
    seen: set[int] = set()
    # Errors may lead to one another in a circle.
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FAILURES:
            name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            return f"{name}{os.strerror(error.errno)}"
        if said := next((words for words in _WORDS if words in str(error)), None):
            return said
        error = error.__cause__ or error.__context__
    return None


def silence(stream: object) -> None:
    """Sends what a stream still holds nowhere: its disk is full, its reader is gone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        # The interpreter flushes once more at its end, and must not fail again then.
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
