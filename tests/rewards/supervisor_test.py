"""A kept server comes back after death and silence; one that is only busy is left alone."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types

import fake_backends
import pytest

from sage_grpo_jax.rewards import spawn, supervisor
from sage_grpo_jax.rewards.client import RewardClient
from sage_grpo_jax.rewards.supervisor import KeptServer, SilenceWatch

HERE = str(pathlib.Path(__file__).parent)


@pytest.fixture
def keep(monkeypatch):
    """keep(backend, silence_seconds) -> KeptServer of a backend of `fake_backends`."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    return lambda backend, silence: KeptServer(f"fake_backends:{backend}", None, silence)


def _wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        time.sleep(0.02)


def test_a_keeper_tries_again_whatever_went_wrong(monkeypatch, tmp_path):
    """As when there is for a moment no memory for a process, or no disk for its log."""
    made, failures = [], [OSError("Cannot allocate memory"), RuntimeError("ended before it served")]

    class Process:
        returncode = -9
        pid = 0

        def __init__(self):
            self.running = False

        def poll(self):
            return None if self.running else self.returncode

    class Server:
        address = "127.0.0.1:7"

        def __init__(self):
            self.process = Process()

        def close(self):
            pass

    def spawn_server(backend, **options):
        if made and failures:
            raise failures.pop(0)
        made.append(Server())
        made[-1].process.running = len(made) > 1  # the first one dies at once
        return made[-1]

    monkeypatch.setattr(spawn, "spawn_server", spawn_server)
    with KeptServer("any"):
        _wait_until(lambda: len(made) == 2)
    assert failures == []


def _submit(client, seed):
    return client.submit(fake_backends.clip(seed), "a red disk", f"run/0/{seed}", 8.0)


def test_a_stopped_server_is_killed_and_what_was_in_flight_is_scored(keep, caplog):
    with keep("Slow", 1.0) as kept, RewardClient(kept.address, budget=60.0) as client:
        assert _submit(client, 0).result(20.0).ok
        first = kept.pid
        os.kill(first, signal.SIGSTOP)
        results = [_submit(client, seed) for seed in range(1, 5)]
        results = [future.result(60.0) for future in results]
        second = kept.pid
    assert all(result.ok for result in results), [result.message for result in results]
    assert min(result.attempts for result in results) > 1
    assert second != first
    lines = [line for line in caplog.messages if "has answered none of" in line]
    assert lines == [
        f"the reward server (process {first}) has answered none of 5 probes in 1 s: killing it"
    ]
    assert any("ended with exit code -9; starting it again" in line for line in caplog.messages)


def test_a_busy_server_is_not_silent(keep, caplog):
    """All its scoring threads compute for several times the silence that is allowed."""
    with keep("Busy", 1.0) as kept, RewardClient(kept.address, budget=60.0) as client:
        first = kept.pid
        results = [_submit(client, seed).result for seed in range(4)]
        assert [result(60.0).attempts for result in results] == [1] * 4
        assert kept.pid == first
    assert "killing" not in caplog.text


def test_without_a_limit_silence_is_borne(keep):
    with keep("Mean", 0.0) as kept:
        first = kept.pid
        os.kill(first, signal.SIGSTOP)
        time.sleep(1.5)
        assert kept.pid == first
        os.kill(first, signal.SIGCONT)


@pytest.fixture
def silent_address():
    """Takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_silence_that_nobody_listened_to_does_not_count(silent_address, monkeypatch):
    """As when the trainer itself was stopped, or the whole computer: the clock has gone on."""
    now = [100.0]
    monkeypatch.setattr(supervisor, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    watch = SilenceWatch(silent_address, 50.0)

    def after(*seconds):
        found = []
        for pause in seconds:
            now[0] += pause
            found.append(watch.is_silent())
        return found

    assert after(10, 10, 10, 10) == [False] * 4
    assert after(3600) == [False]
    assert after(9, 1, 10, 10, 10) == [False] * 5
    assert after(9, 1) == [False, True]
    watch.close()


def test_one_answer_ends_the_silence(monkeypatch, silent_address):
    answered = set()
    monkeypatch.setattr(supervisor, "_answered", lambda probe: probe in answered)
    now = [0.0]
    monkeypatch.setattr(supervisor, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    watch = SilenceWatch(silent_address, 50.0)

    def look():
        now[0] += 10
        return watch.is_silent()

    assert [look() for _ in range(4)] == [False] * 4
    answered.add(watch._unanswered[1])  # late, but an answer
    assert [look() for _ in range(5)] == [False] * 5
    assert look()
    watch.close()


@pytest.mark.slow
def test_a_trainer_that_was_stopped_does_not_blame_its_server():
    program = """
    import sys, time
    from sage_grpo_jax.rewards.supervisor import KeptServer
    with KeptServer("fake_backends:Mean", None, 1.0) as kept:
        for line in sys.stdin:
            print(kept.pid, flush=True)
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": HERE},
        cwd=pathlib.Path(spawn.__file__).parents[2],
    )
    with trainer:

        def server():
            print(file=trainer.stdin, flush=True)
            return int(trainer.stdout.readline())

        first = server()
        for _ in range(3):
            trainer.send_signal(signal.SIGSTOP)
            time.sleep(1.5)
            trainer.send_signal(signal.SIGCONT)
            time.sleep(0.3)
        time.sleep(1.5)
        assert server() == first
        trainer.stdin.close()
