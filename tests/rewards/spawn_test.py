"""Servers in processes of their own: start, failure to start, death of either side."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import fake_backends
import grpc
import pytest

from sage_grpo_jax.rewards import spawn
from sage_grpo_jax.rewards.client import RewardClient
from sage_grpo_jax.rewards.spawn import spawn_server

HERE = str(pathlib.Path(__file__).parent)


def _spawn(backend, **options):
    options.setdefault("env", {"PYTHONPATH": HERE})
    return spawn_server(f"fake_backends:{backend}", **options)


def _gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def _refused(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except ConnectionRefusedError:
        return True
    return False


def _wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        time.sleep(0.02)


def test_the_real_backend_serves_and_closes():
    video = fake_backends.clip(frames=17, side=32)
    prompt = "a large red disk moves left, fast, over a dark background"
    with spawn_server("moving_shapes") as server, RewardClient(server.address) as client:
        assert client.info().fingerprint == server.fingerprint
        assert client.info().names == ("VQ", "MQ", "TA")
        result = client.submit(video, prompt, "run/0/0", 8.0).result(20.0)
        log = server.log_path
        assert result.ok, result
        assert set(result.scores) == {"VQ", "MQ", "TA"}
    assert server.process.returncode == 0
    assert not log.exists()
    server.close()


def test_the_server_does_not_import_jax_and_logs_to_the_file(tmp_path):
    log = tmp_path / "logs" / "server.log"
    with _spawn("ReportsJax", log_path=log) as server, RewardClient(server.address) as client:
        assert server.fingerprint == client.info().fingerprint == "without-jax"
        assert client.submit(fake_backends.clip(), "a", "b", 8.0).result(20.0).ok
    assert "calls by outcome" in log.read_text()


def test_the_moving_shapes_backend_needs_no_jax():
    program = """
    import sys
    import sage_grpo_jax.serve_rewards
    from sage_grpo_jax.rewards import backends
    backends.create("moving_shapes").warm_up()
    sys.exit(int("jax" in sys.modules))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@pytest.mark.parametrize(
    ("backend", "words"),
    [("fake_backends:Nothing", "not a subclass"), ("nonsense", "moving_shapes")],
)
def test_unknown_backends_fail_with_the_reason(backend, words, tmp_path):
    log = tmp_path / "log"
    log.write_text("an older run\n")
    with pytest.raises(RuntimeError, match=words) as error:
        spawn_server(backend, env={"PYTHONPATH": HERE}, log_path=log)
    assert "ended before it served (exit code 2)" in str(error.value)
    assert "an older run" not in str(error.value)
    assert log.read_text().startswith("an older run\n")


def test_a_failed_warm_up_fails_with_the_reason():
    with pytest.raises(RuntimeError, match="no weights on this machine"):
        _spawn("ColdFailure")


def test_a_slow_start_is_given_up():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"did not serve within 1\.5 s"):
        _spawn("NeverReady", startup_timeout=1.5)
    assert time.monotonic() - started < 6.0


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1:{port}"):
            _spawn("Mean", port=port)


def test_a_public_address_needs_consent():
    with pytest.raises(RuntimeError, match="--allow_insecure"):
        _spawn("Mean", extra_args=["--host=0.0.0.0"])


def test_a_server_killed_in_the_middle_may_return(tmp_path):
    env = {"PYTHONPATH": HERE, "DYING_MARKER": str(tmp_path / "died")}
    with (
        _spawn("Dying", env=env) as first,
        RewardClient(first.address, max_in_flight=4, budget=60.0) as client,
    ):
        prompts = ["a red disk"] * 4 + ["die"] + ["a red disk"] * 15
        results = [
            client.submit(fake_backends.clip(seed), prompt, f"run/0/{seed}", 8.0)
            for seed, prompt in enumerate(prompts)
        ]
        assert first.process.wait(20.0) == 139
        port = int(first.address.rpartition(":")[2])
        with _spawn("Dying", env=env, port=port) as second:
            assert second.address == first.address
            results = [future.result(30.0) for future in results]
    assert all(result.ok for result in results), [result.message for result in results]


def test_sigterm_finishes_accepted_calls():
    with _spawn("Slow") as server, RewardClient(server.address) as client:
        future = client.submit(fake_backends.clip(), "a", "b", 8.0)
        time.sleep(0.15)
        server.process.send_signal(signal.SIGTERM)
        result = future.result(20.0)
        assert (result.ok, result.attempts) == (True, 1)
        assert server.process.wait(5.0) == 0


def test_a_lost_backend_ends_the_process_with_an_error(tmp_path):
    log = tmp_path / "log"
    with _spawn("Bad", log_path=log) as server:
        with RewardClient(server.address, budget=0.6) as client:
            result = client.submit(fake_backends.clip(), "lost", "b", 8.0).result(20.0)
            assert (result.ok, result.code) == (False, "UNAVAILABLE")
        assert server.process.wait(5.0) == 1
    assert "sticky device error" in log.read_text()


def test_a_killed_parent_takes_its_server_along():
    program = """
    import sys, time
    from sage_grpo_jax.rewards.spawn import spawn_server
    server = spawn_server("fake_backends:Slow")
    print(server.process.pid, server.address, flush=True)
    time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": HERE},
        cwd=pathlib.Path(spawn.__file__).parents[2],
    )
    with parent:
        pid, address = parent.stdout.readline().split()
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(10.0)
        assert not _gone(int(pid))
        parent.kill()
    _wait_until(lambda: _gone(int(pid)))
    # The main thread may be gone before the last one, which holds the port.
    _wait_until(lambda: _refused(address))


def test_the_watch_alone_notices_the_end_of_the_parent():
    # As on a system without prctl.
    child = """
    import sys, os, time
    sys.platform = "other"
    from sage_grpo_jax.rewards.spawn import die_with_parent
    die_with_parent(int(sys.argv[1]))
    print("watching", flush=True)
    time.sleep(60)
    """
    program = """
    import os, subprocess, sys, time
    command = [sys.executable, "-c", sys.argv[1], str(os.getpid())]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    print(child.pid, flush=True)
    time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), textwrap.dedent(child)]
    root = pathlib.Path(spawn.__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        pid = int(parent.stdout.readline())
        assert not _gone(pid)
        parent.kill()
    _wait_until(lambda: _gone(pid))


def test_the_end_of_the_thread_that_spawned_it_leaves_the_server_alone():
    servers = []
    thread = threading.Thread(target=lambda: servers.append(_spawn("Mean")))
    thread.start()
    thread.join()
    time.sleep(0.8)
    with servers[0] as server, RewardClient(server.address, budget=5.0) as client:
        assert server.process.poll() is None
        assert client.info().names == ("MEAN", "RED")


def test_a_server_of_another_parent_ends_at_once():
    command = [sys.executable, "-m", "sage_grpo_jax.serve_rewards", "--backend=fake_backends:Mean"]
    command += ["--port=0", f"--parent_pid={os.getppid()}"]
    environment = {**os.environ, "PYTHONPATH": HERE}
    root = pathlib.Path(spawn.__file__).parents[2]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, check=False, timeout=300.0
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_the_parent_must_be_a_process():
    with pytest.raises(ValueError, match="parent_pid = 0"):
        spawn.die_with_parent(0)


def test_waiting_for_a_server_can_be_cancelled():
    cancelled = threading.Event()
    threading.Timer(1.0, cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="was not waited for any more"):
        _spawn("NeverReady", cancelled=cancelled)
    assert time.monotonic() - started < 10.0


def test_the_first_process_of_a_container_may_own_a_server():
    """Its id is 1, which elsewhere is that of whoever adopts orphans."""
    program = """
    import os, sys
    from sage_grpo_jax.rewards import spawn
    os.getppid = lambda: 1
    spawn.die_with_parent(1)
    print("alive", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=False, cwd=pathlib.Path(spawn.__file__).parents[2],
    )  # fmt: skip
    assert done.stdout == "alive\n", done.stderr
