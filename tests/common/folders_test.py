"""Folders appear whole or not at all, and dead processes' remains go away."""

import os
import socket
import subprocess
import sys

import pytest

from sage_grpo_jax.weights import files


def fill(path, text="new", overwrite=False, fail=False):
    with files.new_folder(path, overwrite) as folder:
        (folder / "a").write_text(text)
        assert not path.exists() or overwrite or not any(path.iterdir())
        if fail:
            raise OSError("disk full")


def test_new_folder_and_replacement(tmp_path):
    target = tmp_path / "x" / "out"
    fill(target)
    assert (target / "a").read_text() == "new"
    with pytest.raises(ValueError, match="exists already; --overwrite replaces it"):
        fill(target)
    fill(target, "newer", overwrite=True)
    assert (target / "a").read_text() == "newer"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_error_leaves_everything_as_it_was(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OSError, match="disk full"):
        fill(target, fail=True)
    assert not list(tmp_path.iterdir())
    fill(target)
    with pytest.raises(OSError, match="disk full"):
        fill(target, "other", overwrite=True, fail=True)
    assert (target / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder, or not exist"):
        fill(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture(scope="module")
def dead():
    """The id of a process that has ended."""
    return subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()


def leave(path, pid, kind, host=None):
    left = path.with_name(f".{path.name}.{host or socket.gethostname()}.{pid}.{kind}")
    left.mkdir()
    (left / "a").write_text("left")
    return left


def test_remains_of_dead_processes_only(tmp_path, dead):
    target = tmp_path / "out"
    gone = leave(target, dead, "new")
    alive = leave(target, os.getppid(), "new")
    elsewhere = leave(target, dead, "new", host="another-host")
    other = leave(tmp_path / "out2", dead, "new")
    fill(target)
    assert not gone.exists()
    assert alive.exists()
    assert elsewhere.exists()
    assert other.exists()


def test_target_comes_back_after_death_between_the_renames(tmp_path, dead):
    target = tmp_path / "out"
    old = leave(target, dead, "old")
    with pytest.raises(OSError, match="disk full"):
        fill(target, overwrite=True, fail=True)
    assert (target / "a").read_text() == "left"
    leave(target, dead, "old")
    fill(target, "newer", overwrite=True)
    assert (target / "a").read_text() == "newer"
    assert not old.exists()


def test_disk_that_is_too_small(tmp_path):
    files.check_space(tmp_path / "new" / "out", 1)
    with pytest.raises(ValueError, match=r"out: 1000000000\.00 GB to write, .* GB free"):
        files.check_space(tmp_path / "new" / "out", 10**18)
