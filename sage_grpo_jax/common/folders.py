"""Folders of results: they appear whole or not at all, and only what we wrote is ever replaced.

A new folder is filled under a temporary name beside its target, synced to disk and renamed. A
process that is killed leaves its temporary behind, never half of the target; the next write to the
same target removes what dead processes of the same host left. What a folder holds is in its
manifest (`common/manifest.py`): a folder without one, or with anything beside what it lists, is
never replaced, and nothing is deleted but files that a manifest lists and our own temporaries.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator

from sage_grpo_jax.common import files, manifest, termination
from sage_grpo_jax.common.manifest import Manifest

_NEW, _OLD = "new", "old"
_SHOWN = 3  # names in a message


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike, holds: str, *, overwrite: bool = False, field: str = "path"
) -> Iterator[pathlib.Path]:
    """A temporary folder to fill; on leaving without an error it takes the name `path`.

    A symbolic link is followed. A signal that ends the process undoes all of it, or comes too late.

    Args:
      path: of the folder.
      holds: what will be in it, for its manifest: "weights, diffusers".
      overwrite: a folder of ours in its place is replaced.
      field: what messages call the path.

    Raises:
      ValueError: see `check_target`.
      StorageError: the disk is full or broken.
    """
    target = check_target(path, overwrite, field)
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)

    new, old = (files.temporary_path(target, kind) for kind in (_NEW, _OLD))

    def tidy() -> None:
        _remove_temporary(new)
        _put_right(old, target)

    # Whether an error or a signal ends this block, the old target is there or the new one.
    with termination.on_stop(tidy):
        try:
            new.mkdir()
            # It is marked from the start, so that a later process knows whose half of a folder it
            # finds.
            _mark(new, Manifest(holds, manifest.UNFINISHED))
            yield new
            _mark(new, manifest.describe(new, holds))
            _sync_tree(new)
            # Two renames are not one: a signal waits until both are done.
            with termination.uninterrupted():
                # The target is looked at once more: writing may have taken hours, and somebody may
                # have put something there.
                check_target(path, overwrite, field)
                _publish(new, old, target)
        except Exception as error:
            if said := files.disk_failure(error):
                raise files.StorageError(
                    f"{field}={path} could not be written: {said}; nothing of it is left, the same "
                    "command goes on once there is room"
                ) from error
            raise
        finally:
            tidy()


def check_target(
    path: str | os.PathLike, overwrite: bool = False, field: str = "path"
) -> pathlib.Path:
    """Where a folder is to be written, with links followed.

    Raises:
      ValueError: it cannot be a folder, or it holds something that is not ours to replace, or
        that `overwrite` does not allow to be replaced.
    """
    target, shown = files.real_path(path), f"{field}={path}"
    if target.is_symlink():
        raise ValueError(f"{shown}: a symbolic link that leads nowhere; allowed: a folder")
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{shown}: must be a folder, or not exist")
    if os.path.ismount(target):
        raise ValueError(f"{shown}: a disk is mounted there; allowed: a folder below it")

    if _is_empty(target):
        return target
    if not overwrite:
        raise ValueError(f"{shown}: exists already; --overwrite (overwrite=True) replaces it")
    if reason := _not_ours(target):
        raise ValueError(
            f"{shown}: {reason}; it is not replaced. Allowed: another folder, or move this away"
        )
    return target


def check_space(path: str | os.PathLike, count: int, field: str = "path") -> None:
    """Raises a StorageError if the disk of a folder to be written has not `count` bytes free."""
    parent = files.real_path(path)
    # The folder itself may not be there yet: the nearest one above tells which disk it is.
    while not parent.is_dir():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < count:
        raise files.StorageError(
            f"{field}={path}: {count / 1e9:.2f} GB to write, {parent} has {free / 1e9:.2f} GB free"
        )


def claim(
    folder: str | os.PathLike,
    names: Iterable[str],
    holds: str,
    field: str,
    *,
    is_ours: Callable[[], bool] = lambda: False,
) -> None:
    """Makes a folder that results go into, beside what a person may keep there.

    From here on the names are ours to write and to write again, until `settle`.

    Args:
      folder: with links; made where it is not there.
      names: of files in it, or patterns such as "samples/*".
      holds: what they are, for the manifest.
      field: what messages call the folder.
      is_ours: tells of a folder without manifest, from before there were any, whether it is ours.

    Raises:
      ValueError: one of the names is taken by something that we did not write, or that was
        changed since; the folder is a whole one of ours (weights, embeddings) that results beside
        its files would spoil.
    """
    folder = files.real_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(folder)
    names = list(names)
    # Before the manifest, which another process that makes the same folder writes before the rest.
    existing = _existing(folder, names)
    known = manifest.read(folder)
    if known is not None and known.state != manifest.SHARED:
        raise ValueError(f"{field}: {folder} holds {known.holds}; allowed: another folder")
    if known is None and existing and is_ours():
        known = Manifest(holds, manifest.SHARED, dict.fromkeys(names))
    known = known or Manifest(holds, manifest.SHARED)

    # What is there under our names must be ours, as it was when it was written
    taken = [name for name in existing if not known.owns(folder, name)]
    if taken:
        raise ValueError(
            f"{field}: {folder} has {_listed(taken)} already, which this program did not write or "
            "which was changed since; it is not replaced. Allowed: another folder, or move this "
            "away"
        )
    _mark(folder, Manifest(known.holds, manifest.SHARED, {**known.files, **dict.fromkeys(names)}))


def settle(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Takes down how the files of a `claim` are now: one that a person changes later is kept."""
    folder = files.real_path(folder)
    known = manifest.read(folder)
    if known is None:  # somebody has removed it
        return
    stamps = {name: manifest.stamp(folder / name) for name in names if (folder / name).is_file()}
    _mark(folder, Manifest(known.holds, known.state, {**known.files, **stamps}))


def remove_claimed(folder: str | os.PathLike) -> list[str]:
    """Deletes what was claimed in a folder, and the folder where nothing else is in it.

    Returns:
      What is in it besides, and stays.
    """
    folder = files.real_path(folder)
    known = manifest.read(folder)
    names = manifest.contents(folder)
    if known is None:
        return names
    ours = [name for name in names if known.owns(folder, name)]
    for name in ours:
        (folder / name).unlink()
    left = [name for name in names if name not in ours]
    if not left:
        (folder / manifest.FILE).unlink()
        folder.rmdir()
    return left


def _existing(folder: pathlib.Path, names: Iterable[str]) -> list[str]:
    """What is there of names and patterns; of a folder, what is in it."""
    found: list[str] = []
    for name in names:
        # "samples/*" stands for the folder with all that is in it.
        plain = name.removesuffix("/*")
        for path in [folder / name] if plain == name and "*" not in name else folder.glob(plain):
            if path.is_dir() and not path.is_symlink():
                here = path.relative_to(folder).as_posix()
                found += [f"{here}/{inside}" for inside in manifest.contents(path)]
            elif os.path.lexists(path):
                found.append(path.relative_to(folder).as_posix())
    return found


def _not_ours(folder: pathlib.Path) -> str | None:
    """Why a folder may not be replaced; None where all of it was written by us, in one go."""
    try:
        known = manifest.read(folder)
    except ValueError as error:
        return str(error)
    found = manifest.contents(folder)
    if known is None:
        return (
            f"holds {_listed(found)} and no {manifest.FILE}, which would say that this program "
            "wrote it"
        )
    if known.state != manifest.COMPLETE:
        return f"holds {known.holds}, which grew by and by ({manifest.FILE} says so)"

    # A file that was added or changed is a person's work.
    beyond = [name for name in found if name not in known.files]
    if beyond:
        return f"holds {_listed(beyond)}, which this program did not write"
    changed = [name for name in found if not known.owns(folder, name)]
    return f"{_listed(changed)} was changed since it was written" if changed else None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _mark(folder: pathlib.Path, known: Manifest) -> None:
    files.write_atomically(folder / manifest.FILE, known.to_json())


def _publish(new: pathlib.Path, old: pathlib.Path, target: pathlib.Path) -> None:
    """Puts the new folder in place of the target, which is empty, or ours, or not there."""
    # A folder cannot be renamed onto one with files in it: the old one steps aside.
    if target.exists() and not _is_empty(target):
        target.rename(old)
    new.rename(target)  # onto an empty folder too
    # The rename is on disk once the folder above is.
    files.sync(target.parent)
    _put_right(old, target)


def _put_right(old: pathlib.Path, target: pathlib.Path) -> None:
    """Removes what was moved away from a target; puts it back where nothing took its place."""
    if not old.exists():
        return
    if not target.exists():
        old.rename(target)
    elif _is_empty(old):
        old.rmdir()
    elif _not_ours(old) is None:
        _remove_listed(old)


def _remove_listed(folder: pathlib.Path) -> None:
    """Deletes the files that the manifest of a folder lists, and then the folder.

    Raises:
      OSError: there is something else in it, which stays.
    """
    for name in manifest.read(folder).files:
        (folder / name).unlink(missing_ok=True)
    for parent, _, _ in os.walk(folder, topdown=False):
        if parent == str(folder):  # last: it says until then that the rest may go
            (folder / manifest.FILE).unlink()
        os.rmdir(parent)


def _remove_temporary(folder: pathlib.Path) -> None:
    """Deletes a temporary folder of ours."""
    # More than once: threads of a library may still write into it while a signal ends the process.
    for _ in range(100):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)


def _recover(target: pathlib.Path) -> None:
    """Removes what dead processes left beside `target`; puts a target back that was moved away."""
    for old in files.left_by_dead(target, _OLD):
        _put_right(old, target)
    for new in files.left_by_dead(target, _NEW):
        if _is_empty(new) or _is_unfinished(new):
            _remove_temporary(new)


def _is_empty(folder: pathlib.Path) -> bool:
    return next(folder.iterdir(), None) is None


def _is_unfinished(folder: pathlib.Path) -> bool:
    """Whether a folder with the name of a temporary is one: it is marked from the start."""
    try:
        return manifest.read(folder) is not None
    except ValueError:
        return False


def _sync_tree(folder: pathlib.Path) -> None:
    """Returns when all files and folders below, and the folder itself, are on disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            files.sync(pathlib.Path(parent) / name)
        files.sync(pathlib.Path(parent))
