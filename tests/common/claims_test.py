"""Folders that a person may keep things in: results take free names, or ours, and no others."""

import subprocess
import sys

import pytest

from sage_grpo_jax.common import folders, manifest


def tree(folder):
    """Every file below a folder and what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_whole(path):
    with folders.new_folder(path, "a test", overwrite=True) as folder:
        (folder / "a").write_text("")


def claim(folder, *names, **more):
    folders.claim(folder, names or ("report.md", "curve.png"), "a report", "--out", **more)


def test_names_that_are_free_are_claimed_and_others_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path)
    (tmp_path / "report.md").write_text("one")
    claim(tmp_path)  # a run that was killed before it was done
    (tmp_path / "report.md").write_text("two")
    folders.settle(tmp_path, ["report.md", "curve.png"])
    claim(tmp_path)  # unchanged
    folders.settle(tmp_path, ["report.md", "curve.png"])
    (tmp_path / "report.md").write_text("two, and my remarks")
    with pytest.raises(ValueError, match=r"--out: .* has report\.md already, which this program"):
        claim(tmp_path)
    claim(tmp_path, "curve.png")


def test_a_name_that_is_taken_is_refused(tmp_path):
    (tmp_path / "curve.png").write_text("mine")
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "a").write_text("mine")
    (tmp_path / "events.7").write_text("mine")
    before = tree(tmp_path)
    for names, named in (
        (["curve.png"], "curve.png"),
        (["runs/*"], "runs/old/a"),
        (["events.*"], "events.7"),
        (["free", "curve.png", "runs/*"], "curve.png, runs/old/a"),
    ):
        with pytest.raises(ValueError, match=f"has {named} already"):
            claim(tmp_path, *names)
    assert tree(tmp_path) == before
    claim(tmp_path, "curve.png", is_ours=lambda: True)


def test_patterns_belong_to_us_from_the_claim_on(tmp_path):
    claim(tmp_path, "samples/*", "events.*")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "1.png").write_text("")
    (tmp_path / "events.1").write_text("")
    claim(tmp_path, "samples/*", "events.*")


def test_a_whole_folder_is_no_place_for_results(tmp_path):
    write_whole(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"--out: .*weights holds a test; allowed: another folder"):
        claim(tmp_path / "weights")


def test_a_shared_folder_is_never_replaced(tmp_path):
    claim(tmp_path / "out")
    (tmp_path / "out" / "report.md").write_text("one")
    folders.settle(tmp_path / "out", ["report.md"])
    with pytest.raises(ValueError, match="holds a report, which grew by and by"):
        write_whole(tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text() == "one"


def test_what_was_claimed_is_removed_and_nothing_else(tmp_path):
    claim(tmp_path / "work", "batch-*")
    (tmp_path / "work" / "batch-1").write_text("")
    (tmp_path / "work" / "notes.txt").write_text("mine")
    assert folders.remove_claimed(tmp_path / "work") == ["notes.txt"]
    assert sorted(tree(tmp_path / "work")) == ["notes.txt", manifest.FILE]
    (tmp_path / "work" / "notes.txt").unlink()
    assert folders.remove_claimed(tmp_path / "work") == []
    assert not (tmp_path / "work").exists()


def test_processes_that_make_one_folder_at_once(tmp_path):
    """A job array: each one claims the same names and writes the same file, in any order."""
    program = (
        "import sys, pathlib; from sage_grpo_jax.common import folders, files\n"
        "sys.stdin.readline()\n"
        "folders.claim(sys.argv[1], ['sweep.json'], 'a sweep', '--workdir')\n"
        "files.write_atomically(pathlib.Path(sys.argv[1]) / 'sweep.json', b'{}')"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "sweep"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in started:  # not communicate, which waits
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        _, err = process.communicate()
        assert process.returncode == 0, err
