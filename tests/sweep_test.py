"""A sweep and its runs: no signal is lost, whenever it comes."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import types

import pytest
from entry_modules import import_entry

sweep = import_entry("sweep")

# A run that saves and stops when it is asked to.
RUN = """
import pathlib, signal, sys, time
def stop(*unused):
    pathlib.Path(sys.argv[1]).write_text("asked")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text("runs")
time.sleep({seconds})
"""


class Point:
    """A point of a sweep; `folder` is a file that the run writes."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.name, self.overrides = folder, folder.name, {}
        self.status = "new"


@pytest.fixture
def start(monkeypatch):
    """start(seconds, before): what `sweep` starts takes so long; `before` is called first."""

    def patch(seconds, before=lambda: None):
        def popen(command):
            before()
            (folder,) = [flag.partition("=")[2] for flag in command if "workdir" in flag]
            program = [sys.executable, "-c", RUN.format(seconds=seconds), folder]
            return subprocess.Popen(program)

        fake = types.SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setattr(sweep, "subprocess", fake)

    return patch


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_when(file: pathlib.Path) -> None:
    def watch():
        while not file.exists() or file.read_text() != "runs":
            pass
        terminate()

    threading.Thread(target=watch).start()


def test_a_signal_while_a_run_goes_on_is_passed_on(start, tmp_path, capsys):
    start(60)
    points = [Point(tmp_path / "a"), Point(tmp_path / "b")]
    terminate_when(points[0].folder)
    assert sweep._run_all(points, []) == []
    assert points[0].folder.read_text() == "asked"
    assert not points[1].folder.exists()
    assert "stopped by a signal; the same command goes on" in capsys.readouterr().out


def test_a_signal_before_the_run_is_there_is_passed_on(start, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    start(60, terminate)
    status, asked = sweep.run(Point(tmp_path / "a"), [])
    assert asked
    assert status in (0, -signal.SIGTERM)  # which it is before it has a handler
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_signal_when_the_run_is_done_ends_the_sweep_all_the_same(start, tmp_path, monkeypatch):
    """The run finishes; the next one must not begin."""
    start(0)
    points = [Point(tmp_path / "a"), Point(tmp_path / "b")]
    wait = sweep._wait

    def wait_and_be_asked(process):
        process.wait()
        terminate()
        points[0].status = "finished"
        return wait(process)

    monkeypatch.setattr(sweep, "_wait", wait_and_be_asked)
    assert sweep._run_all(points, []) == []
    assert not points[1].folder.exists()


def test_failed_runs_are_named_and_the_others_go_on(start, tmp_path):
    points = [Point(tmp_path / "none" / "a"), Point(tmp_path / "b")]  # the first cannot write
    start(0)
    points[1].status = "new"
    assert sweep._run_all([points[0]], []) == ["a (exit status 1)"]
