"""Files that are there whole or not at all; what is made of an error of the disk."""

import errno
import os
import pathlib
import resource
import socket

import pytest

from sage_grpo_jax.common import files


def test_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "below" / "file"
    files.write_atomically(path, b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            files.write_atomically(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_whatever_ends_a_write_leaves_no_temporary(tmp_path, monkeypatch):
    def stop(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    files.write_atomically(tmp_path / "link", b"text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_bytes() == b"text"


def test_leftovers_are_those_of_dead_processes_of_this_host(tmp_path):
    host = socket.gethostname()
    left = tmp_path / f".a.json.{host}.{os.getpid()}.{files.TEMPORARY}"
    kept = [
        tmp_path / f".a.json.{host}.{os.getppid()}.{files.TEMPORARY}",
        tmp_path / f".a.json.another.{os.getpid()}.{files.TEMPORARY}",
        tmp_path / ".notes.tmp",
        tmp_path / f"a.json.{host}.{os.getpid()}.{files.TEMPORARY}",
        tmp_path / "a.json",
    ]
    for path in (left, *kept):
        path.write_text("")
    files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    files.remove_leftovers(tmp_path / "none")


def test_real_paths_have_no_dots_and_no_links(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    # Not what the text says, which would be tmp_path/c: the link is followed first.
    assert files.real_path("../link/../c") == tmp_path / "a" / "c"
    assert files.real_path(pathlib.Path("b")) == tmp_path / "a" / "b"


def _raised(error, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


FULL = OSError(errno.ENOSPC, "as the locale has it", "/a/file")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "/a/file: No space left on device"),
        (OSError(errno.EDQUOT, ""), "Disk quota exceeded"),
        (_raised(ValueError("library"), cause=FULL), "/a/file: No space left on device"),
        (_raised(ValueError("library"), context=FULL), "/a/file: No space left on device"),
        (ValueError('OUT_OF_RANGE: "x": File too large [27]'), "File too large"),
        (RuntimeError("writing failed; Input/output error"), "Input/output error"),
        (OSError(errno.ENOENT, "No such file or directory", "x"), None),
        (ValueError("a wrong value"), None),
    ],
)
def test_failures_of_the_disk_are_told_from_bad_input(error, said):
    assert files.disk_failure(error) == said


def test_errors_that_name_each_other():
    first, second = ValueError("one"), ValueError("two")
    first.__context__, second.__context__ = second, first
    assert files.disk_failure(first) is None
