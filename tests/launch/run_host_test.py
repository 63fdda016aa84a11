"""launch/run_host.sh: real processes that end, are told to end, and are killed."""

import contextlib
import os
import pathlib
import signal
import subprocess

import pytest
from launch_stubs import HOSTILE, LAUNCH, Stubs

# Says that it is ready, waits for SIGTERM, and ends as a run that saved.
WAITS = (
    "trap 'echo \"stopped at step 3; the same command goes on\"; exit 0' TERM; echo ready;"
    " while true; do sleep 0.01; done"
)


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> Stubs:
    return Stubs(tmp_path)


def host(stubs: Stubs, *words: str, **variables: str) -> str:
    result = stubs.run("run_host.sh", *words, **variables)
    assert result.status == 0, result.err
    return result.out


def status(stubs: Stubs) -> str:
    return host(stubs, "status").partition(": ")[2].strip()


def until_ended(stubs: Stubs) -> None:
    assert stubs.run("flock", "sage_grpo_jax_run/lock", "true").status == 0


def until_ready(stubs: Stubs) -> None:
    script = "until grep -q ready sage_grpo_jax_run/log; do sleep 0.01; done"
    assert stubs.run("bash", "-c", script).status == 0


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 2", 2),
        ("kill -KILL $$", 137),
        ("echo 'done: 3 steps'; exit 0", 0),
        ("echo 'stopped at step 3; the same command goes on'; exit 0", 75),
        ("echo 'stopped at step 3' >&2; echo a warning of a library >&2; exit 0", 75),
        ("echo 'stopped by a signal; 3 of 4 runs are left'", 75),
        ("echo 'stopped: the disk is full' >&2; exit 1", 1),
        ("echo 'stopped: no'; for i in 1 2 3 4 5 6; do echo step $i; done; exit 0", 0),
        ("echo 'it stopped at step 3'; exit 0", 0),
    ],
)
def test_how_a_command_ended(stubs, command, expected):
    result = stubs.run("run_host.sh", "foreground", "bash", "-c", command)
    assert result.status == expected
    assert status(stubs) == "idle"

    host(stubs, "start", "bash", "-c", command)
    until_ended(stubs)
    assert status(stubs) == f"exit {expected}"


def test_a_program_that_is_not_there(stubs):
    host(stubs, "start", "no-such-program")
    until_ended(stubs)
    assert status(stubs) == "exit 127"
    assert "no-such-program" in host(stubs, "logs")


def test_words_arrive_as_they_are(stubs):
    command = ["bash", "-c", "printf '<%s>' \"$@\"", "-", *HOSTILE]
    expected = "".join(f"<{word}>" for word in HOSTILE)
    assert stubs.run("run_host.sh", "foreground", *command).out == expected
    host(stubs, "start", *command)
    until_ended(stubs)
    assert host(stubs, "logs") == expected


def test_a_command_runs_in_the_repository_with_the_interpreter_of_the_setup(stubs):
    program = stubs.home / "venv/bin/trainer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/bash\npwd -P\n")
    program.chmod(0o755)
    result = stubs.run("run_host.sh", "foreground", "trainer", VENV=str(stubs.home / "venv"))
    assert result.out.strip() == str(LAUNCH.parent.resolve())


def test_a_second_start_changes_nothing(stubs):
    host(stubs, "start", "bash", "-c", WAITS)
    until_ready(stubs)
    assert status(stubs) == "running"
    assert host(stubs, "start", "touch", "second", LOCK_SECONDS="0").endswith("running already\n")
    assert status(stubs) == "running"
    assert host(stubs, "stop").endswith(": exit 75\n")
    assert not (LAUNCH.parent / "second").exists()
    # Now it is allowed, and what was before is forgotten; its log stays.
    host(stubs, "start", "true")
    until_ended(stubs)
    assert status(stubs) == "exit 0"
    assert len(list((stubs.home / "sage_grpo_jax_run").glob("*.log"))) == 2


def test_stop_kills_what_does_not_end(stubs):
    host(stubs, "start", "bash", "-c", "trap '' TERM; echo ready; while true; do sleep 0.01; done")
    until_ready(stubs)
    host(stubs, "stop", STOP_SECONDS="0")
    until_ended(stubs)
    assert status(stubs) == "lost"
    assert host(stubs, "stop").endswith(": lost\n")  # nothing to stop any more


def test_a_worker_whose_supervisor_was_killed_is_running_until_the_command_ends(stubs):
    host(stubs, "start", "bash", "-c", WAITS)
    until_ready(stubs)
    session = int((stubs.home / "sage_grpo_jax_run/pid").read_text())
    os.kill(session, signal.SIGKILL)
    assert status(stubs) == "running"
    os.killpg(session, signal.SIGKILL)
    until_ended(stubs)
    assert status(stubs) == "lost"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_in_a_container_the_signal_is_handed_on_and_the_save_awaited(stubs, number):
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "run_host.sh"), "foreground", "bash", "-c", WAITS],
        env=stubs.environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell cannot trap what is ignored when it starts, as SIGINT is in a background job.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert out == "stopped at step 3; the same command goes on\n"
    assert process.returncode == 75
    assert list(stubs.home.iterdir()) == []


def test_a_dry_run_prints_the_command(stubs):
    for word in ("start", "foreground"):
        result = stubs.run("run_host.sh", "--dry-run", word, "touch", "a b")
        assert (result.status, result.out) == (0, "touch 'a b'\n")
    assert list(stubs.home.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "error: '': unknown word; allowed: start"),
        (["begin"], 2, "error: 'begin': unknown word; allowed: start"),
        (["start"], 2, "error: COMMAND: missing"),
        (["foreground"], 2, "error: COMMAND: missing"),
        (["logs"], 1, ": nothing was run yet"),
    ],
)
def test_what_cannot_be_done_is_one_line(stubs, words, status, message):
    result = stubs.run("run_host.sh", *words)
    assert result.status == status
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(stubs.home.iterdir()) == []
