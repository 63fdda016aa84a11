"""Folders appear whole or not at all; only what we wrote is replaced; remains go away."""

import errno
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from sage_grpo_jax.common import files, folders, manifest


def fill(path, text="new", overwrite=False, fail=None):
    with folders.new_folder(path, "a test", overwrite=overwrite) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "a").write_text(text)
        (folder / "b").write_text(text)
        if fail is not None:
            raise fail


def tree(folder):
    """Every file and link below a folder and what is in it; empty folders too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_new_folder_and_replacement(tmp_path):
    target = tmp_path / "x" / "out"
    fill(target)
    assert (target / "below" / "a").read_text() == "new"
    with pytest.raises(ValueError, match=r"path=.*out: exists already; --overwrite"):
        fill(target)
    fill(target, "newer", overwrite=True)
    assert (target / "below" / "a").read_text() == "newer"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_the_manifest_lists_what_is_there(tmp_path):
    fill(tmp_path / "out")
    values = json.loads((tmp_path / "out" / manifest.FILE).read_text())
    assert sorted(values["files"]) == ["b", "below/a"]
    assert values["files"]["b"]["size"] == 3
    assert (values["state"], values["holds"]) == ("complete", "a test")
    assert values["written_by"].startswith("sage_grpo_jax ")
    fill(tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")  # not even a time of day differs


def add_file(out):
    (out / "notes.txt").write_text("mine")


def add_hidden_file(out):
    (out / "below" / ".mine").write_text("mine")


def add_empty_folder(out):
    (out / "below" / "mine").mkdir()


def add_link(out):
    (out / "link").symlink_to(out / "b")


def add_link_to_folder(out):
    (out / "link").symlink_to(out.parent, target_is_directory=True)


def change_file(out):
    (out / "b").write_text("old")  # as long as before


def replace_file_by_link(out):
    (out.parent / "elsewhere").write_text("new")
    (out / "b").unlink()
    (out / "b").symlink_to(out.parent / "elsewhere")


def remove_manifest(out):
    (out / manifest.FILE).unlink()


def cut_manifest(out):
    text = (out / manifest.FILE).read_text()
    (out / manifest.FILE).write_text(text[: len(text) // 2])


def edit_manifest(**changes):
    def edit(out):
        values = json.loads((out / manifest.FILE).read_text())
        (out / manifest.FILE).write_text(json.dumps({**values, **changes}))

    return edit


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (add_file, "holds notes.txt, which this program did not write"),
        (add_hidden_file, "holds below/.mine, "),
        (add_empty_folder, "holds below/mine/, "),
        (add_link, "holds link, "),
        (add_link_to_folder, "holds link, "),
        (change_file, "b was changed since it was written"),
        (replace_file_by_link, "b was changed since"),
        (remove_manifest, f"holds b, below/a and no {manifest.FILE}"),
        (cut_manifest, f"{manifest.FILE} is no manifest: "),
        (edit_manifest(files=["b"]), "files=['b']: must be an object"),
        (edit_manifest(manifest_version=2), "manifest_version=2: must be 1"),
        (edit_manifest(state="whole"), "state='whole': must be one of"),
        (edit_manifest(state="unfinished"), "holds a test, which grew by and by"),
        (edit_manifest(state="shared"), "holds a test, which grew by and by"),
        (edit_manifest(files={"../b": None}), "'../b': must be a file in the folder"),
        (edit_manifest(files={"/b": None}), "'/b': must be a file"),
        (edit_manifest(files={"b": {"size": "3"}}), "size='3': must be an integer"),
        (edit_manifest(files={"b": 3}), "files: b=3: must be an object or null"),
        (edit_manifest(files={}), "holds b, below/a, which this program did not write"),
        (edit_manifest(files={"b": None, "*": None}), "holds below/a, which this program"),
    ],
)
def test_nothing_else_is_replaced(tmp_path, spoil, named):
    out = tmp_path / "out"
    fill(out)
    spoil(out)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"it is not replaced. Allowed: another folder") as error:
        fill(out, overwrite=True)
    assert named in str(error.value)
    assert str(error.value).startswith(f"path={out}: ")
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_what_comes_while_the_folder_is_written_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    fill(out)
    with (
        pytest.raises(ValueError, match=r"holds notes\.txt"),
        folders.new_folder(out, "a test", overwrite=True),
    ):
        add_file(out)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "b").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_lost_a_file_may_be_replaced(tmp_path):
    fill(tmp_path / "out")
    (tmp_path / "out" / "b").unlink()
    fill(tmp_path / "out", "newer", overwrite=True)
    assert (tmp_path / "out" / "b").read_text() == "newer"


def test_a_copy_may_be_replaced(tmp_path):
    """Times of files do not count."""
    fill(tmp_path / "out")
    subprocess.run(["cp", "-r", tmp_path / "out", tmp_path / "copy"], check=True)
    fill(tmp_path / "copy", "newer", overwrite=True)


def test_one_tensor_of_a_large_file_that_was_trained_further(tmp_path):
    """The size stays, and what is stored in parts only is noticed all the same."""
    with folders.new_folder(tmp_path / "out", "a test") as folder:
        (folder / "large").write_bytes(bytes(5 << 20))
    with (tmp_path / "out" / "large").open("r+b") as file:
        file.seek((5 << 20) // 3)
        file.write(bytes([1]) * (1 << 20))
    with pytest.raises(ValueError, match="large was changed since"):
        fill(tmp_path / "out", overwrite=True)


def test_a_link_is_followed(tmp_path, monkeypatch):
    elsewhere = tmp_path / "disk" / "out"
    fill(elsewhere)
    link = tmp_path / "link"
    link.symlink_to(elsewhere)
    fill(link, "newer", overwrite=True)
    assert link.is_symlink()
    assert (elsewhere / "b").read_text() == "newer"
    # And one to a folder that is not there yet; what is written lies on the disk of the target.
    (tmp_path / "next").symlink_to(tmp_path / "disk" / "next")
    with folders.new_folder(tmp_path / "next", "a test") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "b").write_text("there")
    assert (tmp_path / "disk" / "next" / "b").read_text() == "there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link", "next"]
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["next", "out"]

    asked = []
    usage = folders.shutil.disk_usage
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda p: asked.append(p) or usage(p))
    folders.check_space(link, 1)
    folders.check_space(tmp_path / "link" / "below" / ".." / "new", 1)
    assert asked == [elsewhere, elsewhere]


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop: a symbolic link that leads nowhere"):
        fill(tmp_path / "loop")


def test_paths_with_dots(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    fill("../b/../out")
    assert (tmp_path / "out" / "b").read_text() == "new"
    fill("../out/.", "newer", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


def test_error_leaves_everything_as_it_was(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(files.StorageError, match=r"out could not be written: No space left"):
        fill(target, fail=DISK_FULL)
    assert not list(tmp_path.iterdir())
    fill(target)
    for error in (RuntimeError("other"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fill(target, "other", overwrite=True, fail=error)
        assert (target / "b").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_rename_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, renames):
    """The first moves the old folder away, the second puts the new one in its place."""
    target = tmp_path / "out"
    fill(target)
    before, rename, calls = tree(target), pathlib.Path.rename, []

    def fail(self, other):
        calls.append(other)
        if len(calls) == renames + 1:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", fail)
        with pytest.raises(files.StorageError, match="Input/output error"):
            fill(target, "other", overwrite=True)
    assert tree(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder, or not exist"):
        fill(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert (tmp_path / "out" / "b").read_text() == "new"


def test_a_disk_of_its_own_is_refused(tmp_path, monkeypatch):
    """It cannot be renamed."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(ValueError, match="out: a disk is mounted there; allowed: a folder below"):
        fill(tmp_path / "out")


@pytest.fixture(scope="module")
def dead():
    """The id of a process that has ended."""
    return subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()


def leave(path, pid, kind, host=None, marked=True):
    left = path.with_name(f".{path.name}.{host or socket.gethostname()}.{pid}.{kind}")
    left.mkdir()
    (left / "b").write_text("left")
    if marked:
        state = manifest.UNFINISHED if kind == "new" else manifest.COMPLETE
        stamps = {} if kind == "new" else {"b": manifest.stamp(left / "b")}
        (left / manifest.FILE).write_bytes(manifest.Manifest("x", state, stamps).to_json())
    return left


def test_remains_of_dead_processes_only(tmp_path, dead):
    target = tmp_path / "out"
    gone = leave(target, dead, "new")
    not_ours = tmp_path / f".out.{socket.gethostname()}.{int(dead) + 10**8}.new"
    not_ours.mkdir()
    (not_ours / "mine").write_text("mine")
    kept = [
        leave(target, os.getppid(), "new"),
        leave(target, dead, "new", host="another-host"),
        leave(tmp_path / "out2", dead, "new"),
        not_ours,
    ]
    before = [tree(path) for path in kept]
    fill(target)
    assert not gone.exists()
    assert [tree(path) for path in kept] == before


def test_target_comes_back_after_death_between_the_renames(tmp_path, dead):
    target = tmp_path / "out"
    old = leave(target, dead, "old")
    with pytest.raises(RuntimeError):
        fill(target, overwrite=True, fail=RuntimeError())
    assert (target / "b").read_text() == "left"
    leave(target, dead, "old")
    fill(target, "newer", overwrite=True)
    assert (target / "b").read_text() == "newer"
    assert not old.exists()
    # One that a person put something into stays.
    leave(target, dead, "old")
    (old / "mine").write_text("mine")
    fill(target, "newest", overwrite=True)
    assert (old / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "below/notes.txt"])
def test_only_what_a_manifest_lists_is_deleted(tmp_path, name):
    """Even where something came after all checks."""
    fill(tmp_path / "out")
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        folders._remove_listed(tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_folder_that_is_only_ours_goes_whole(tmp_path):
    fill(tmp_path / "out")
    folders._remove_listed(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_too_small(tmp_path):
    folders.check_space(tmp_path / "new" / "out", 1)
    with pytest.raises(files.StorageError, match=r"out: 1000000000\.00 GB to write, .* GB free"):
        folders.check_space(tmp_path / "new" / "out", 10**18)
