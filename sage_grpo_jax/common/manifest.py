"""The file that says what this program wrote into a folder, and how it was when it was written.

    {"manifest_version": 1, "written_by": "sage_grpo_jax 0.1.0", "holds": "weights, diffusers",
     "state": "complete", "files": {"config.json": {"size": 812, "digest": "5f0c..."}, ...}}

`complete`: the folder was written in one go and holds the listed files and nothing else; it may be
replaced while that is so. `shared`: a folder that results are put into, where a person may keep
other things; the listed files may be written again while they are as they were, and so may names
without size and digest (patterns, as in "samples/*"), which belong to the program altogether.
`unfinished`: a folder that is being written.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from sage_grpo_jax.common import checked_json

FILE = "sage_grpo_jax_manifest.json"
COMPLETE, SHARED, UNFINISHED = "complete", "shared", "unfinished"
_VERSION = 1
_STATES = (COMPLETE, SHARED, UNFINISHED)
_MAX_BYTES = 64 << 20  # of the file: a million names
_BLOCK, _BLOCKS = 4096, 16  # files of up to their product are digested whole


@dataclasses.dataclass(frozen=True)
class Stamp:
    """How a file is: its size in bytes and the digest of `stamp`."""

    size: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds, in words, in which state it is, and a stamp for each file."""

    holds: str
    state: str
    files: Mapping[str, Stamp | None] = dataclasses.field(default_factory=dict)

    def owns(self, folder: pathlib.Path, name: str) -> bool:
        """Whether a file in the folder is the program's and unchanged, or not there."""
        path, known = folder / name, self.files.get(name)
        if not os.path.lexists(path):
            return True
        if known is not None:
            return _is_plain(path) and stamp(path) == known

        # Names without a stamp grow while a run goes on: they are ours whatever they hold.
        patterns = [pattern for pattern, value in self.files.items() if value is None]
        return name in patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)

    def to_json(self) -> bytes:
        """The text of the file; the same for the same content."""
        values = {
            "manifest_version": _VERSION,
            "written_by": f"sage_grpo_jax {_program_version()}",
            "holds": self.holds,
            "state": self.state,
            "files": {
                name: None if value is None else dataclasses.asdict(value)
                for name, value in sorted(self.files.items())
            },
        }
        return (json.dumps(values, indent=1) + "\n").encode()


def _program_version() -> str:
    try:
        return metadata.version("sage_grpo_jax")
    except metadata.PackageNotFoundError:  # run from its source, not installed
        return "(not installed)"


def describe(folder: pathlib.Path, holds: str) -> Manifest:
    """The manifest of a folder that was written in one go."""
    files = {name: stamp(folder / name) for name in contents(folder) if not name.endswith("/")}
    return Manifest(holds, COMPLETE, files)


def contents(folder: pathlib.Path) -> list[str]:
    """Everything below a folder but the manifest, sorted: files, links, empty folders ("name/")."""
    found = []
    # By itself os.walk passes over what it cannot read, and what is not seen would count as not
    # there.
    for parent, folders, names in os.walk(folder, onerror=_raise):
        here = pathlib.Path(parent).relative_to(folder)
        links = [name for name in folders if (pathlib.Path(parent) / name).is_symlink()]
        found += [(here / name).as_posix() for name in (*names, *links)]
        if not folders and not names and parent != str(folder):
            found.append(f"{here.as_posix()}/")
    return sorted(name for name in found if name != FILE)


def _raise(error: OSError) -> None:
    raise error


def stamp(path: pathlib.Path) -> Stamp:
    """Size and digest of a file: SHA-256 of all of it, or, of a large one, of 16 parts of it.

    A file of gigabytes is not read again for this. Weights that somebody trained further differ in
    every part, and another header is in the first.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
        else:
            for i in range(_BLOCKS):
                # The blocks lie evenly from the first one of the file to its last one.
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return Stamp(size, digest.hexdigest())


def read(folder: pathlib.Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
      ValueError: a file of this name that is no manifest.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return None
    try:
        if not _is_plain(path):
            raise ValueError("not a plain file")
        return _parse(checked_json.load(path, _MAX_BYTES))
    except ValueError as error:
        raise ValueError(f"{path} is no manifest: {error}") from error


def _parse(values: dict[str, Any]) -> Manifest:
    if (version := checked_json.member(values, "manifest_version", int)) != _VERSION:
        raise ValueError(f"manifest_version={version}: must be {_VERSION}")
    holds, state = (checked_json.member(values, name, str) for name in ("holds", "state"))
    if state not in _STATES:
        raise ValueError(f"state={checked_json.shown(state)}: must be one of {_STATES}")
    files = checked_json.member(values, "files", dict)
    return Manifest(holds, state, {name: _parse_entry(name, v) for name, v in files.items()})


def _parse_entry(name: str, value: Any) -> Stamp | None:
    path = pathlib.PurePosixPath(name)
    # Listed files may be deleted, so a manifest that somebody wrote must not name any outside.
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == FILE:
        raise ValueError(f"files: {checked_json.shown(name)}: must be a file in the folder")
    if checked_json.typed(value, dict | None, f"files: {name}") is None:
        return None
    size, digest = (checked_json.member(value, *what) for what in (("size", int), ("digest", str)))
    return Stamp(size, digest)


def _is_plain(path: pathlib.Path) -> bool:
    return path.is_file() and not path.is_symlink()
