"""Writing files and folders so that they appear whole or not at all.

Everything is written under a temporary name beside the target, synced to disk and renamed. A
process that is killed leaves its temporary behind, never half of the target; the next write to the
same target removes what dead processes left.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator

_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, overwrite: bool) -> Iterator[pathlib.Path]:
    """A temporary folder to fill; on leaving without an error it takes the name `path`.

    Raises:
      ValueError: `path` exists, and `overwrite` is not set or it is not a folder.
    """
    path = pathlib.Path(path).absolute()
    check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover(path)
    new, old = _temporary(path, _NEW), _temporary(path, _OLD)
    new.mkdir()
    try:
        yield new
        sync(new)
        if path.exists():
            check_target(path, overwrite)
            path.rename(old)
        new.rename(path)
        _sync_one(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_space(path: pathlib.Path, count: int) -> None:
    """Raises a ValueError if the disk of a folder to be written has not `count` bytes free."""
    parent = path.absolute()
    while not parent.is_dir():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < count:
        raise ValueError(
            f"dst={path}: {count / 1e9:.2f} GB to write, {parent} has {free / 1e9:.2f} GB free"
        )


def check_target(path: pathlib.Path, overwrite: bool) -> None:
    """Raises a ValueError if `path` cannot be written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"path={path}: must be a folder, or not exist")
    if path.exists() and not overwrite and any(path.iterdir()):
        raise ValueError(f"path={path}: exists already; --overwrite replaces it")


def sync(folder: pathlib.Path) -> None:
    """Returns when all files and folders below, and the folder itself, are on disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_one(pathlib.Path(parent) / name)
        _sync_one(pathlib.Path(parent))


def _temporary(path: pathlib.Path, kind: str) -> pathlib.Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{kind}")


def _recover(path: pathlib.Path) -> None:
    """Removes what dead processes of this host left beside `path`; puts a moved target back."""
    prefix = f".{path.name}.{socket.gethostname()}."
    for left in sorted(path.parent.iterdir()):
        pid, _, kind = left.name.removeprefix(prefix).partition(".")
        if not left.name.startswith(prefix) or not pid.isdigit() or kind not in (_NEW, _OLD):
            continue
        if int(pid) != os.getpid() and _runs(int(pid)):
            continue
        if kind == _OLD and not path.exists():  # killed between the two renames
            left.rename(path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync_one(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
