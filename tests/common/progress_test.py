"""Progress lines, in a terminal and in a file."""

import errno
import io

import pytest

from sage_grpo_jax.common import progress as progress_lib


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, as a list of one number that tests set."""
    now = [100.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_line_is_rewritten_with_the_time_left(clock):
    stream = _Terminal()
    with progress_lib.Progress(8, "videos", stream) as progress:
        clock[0] += 50.0
        progress.update(2)
        clock[0] += 3750.0
        progress.update()
    lines = stream.getvalue().split("\r\x1b[K")
    assert lines[1] == f"[{'#' * 6}{' ' * 18}] 2/8 videos, 25 s each, 2:30 left"
    assert lines[2].endswith("3/8 videos, 1.27e+03 s each, 1:45:33 left\n")
    assert stream.getvalue().count("\n") == 1


def test_plain_lines_are_rare_but_the_last_one_always_comes(clock):
    stream = io.StringIO()
    with progress_lib.Progress(100, "prompts", stream) as progress:
        for _ in range(100):
            clock[0] += 0.3
            progress.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("1/100 prompts, 0.3 s each")
    assert lines[-1].startswith("100/100 prompts, 0.3 s each, 0:00 left")
    assert "\r" not in stream.getvalue()


def test_notes_stay(clock):
    plain, terminal = io.StringIO(), _Terminal()
    for stream in (plain, terminal):
        with progress_lib.Progress(2, "videos", stream) as progress:
            progress.update()
            progress.note("a word")
    assert plain.getvalue().splitlines()[1] == "a word"
    note, _, line = terminal.getvalue().rpartition("a word\n")
    assert note.endswith("\r\x1b[K")
    assert line.strip().endswith("1/2 videos, 0 s each, 0:00 left")


class _Full(_Terminal):
    """Standard error on a disk that is full."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_behind_the_progress_does_not_stop_the_work():
    with progress_lib.Progress(2, "videos", _Full()) as progress:
        progress.update(2)
        progress.note("a word")
