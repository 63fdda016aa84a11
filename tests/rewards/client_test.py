"""The client over real gRPC: concurrency, retries within a budget, distrust of answers."""

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time

import fake_backends
import grpc
import numpy as np
import pytest
from scripted_service import Script, scripted

from sage_grpo_jax.rewards import types
from sage_grpo_jax.rewards.client import RewardClient
from sage_grpo_jax.rewards.server import RewardServer

CODE = grpc.StatusCode


@contextlib.contextmanager
def _serving(backend, **options):
    server = RewardServer(backend, **options)
    server.start()
    server.warm_up()
    try:
        yield server
    finally:
        server.stop(grace=0.0)


def _submit(client, seed=0, prompt="a red disk"):
    return client.submit(fake_backends.clip(seed), prompt, f"run/0/{seed}", 8.0)


def _one(address, **options):
    """The result of one sample."""
    with RewardClient(address, **options) as client:
        return _submit(client).result(20.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_result_belongs_to_its_clip():
    with _serving(fake_backends.Mean()) as server, RewardClient(server.address) as client:
        results = [_submit(client, seed) for seed in range(40)]
        results = [future.result(20.0) for future in results]
    for seed, result in enumerate(results):
        video = fake_backends.clip(seed).astype(np.float64)
        assert result.ok
        assert result.code == types.OK
        np.testing.assert_allclose(result.raw["MEAN"], video.mean())
        np.testing.assert_allclose(result.scores["MEAN"], video.mean() - 100.0)
        np.testing.assert_allclose(result.scores["RED"], video[..., 0].mean() / 8.0)
        assert result.fingerprint == "mean-1"
        assert result.attempts == 1
        assert 0.0 < result.server_seconds <= result.seconds


def test_a_reward_that_is_optional_takes_no_sample_out():
    """RED of this clip is no number, which fails the sample unless RED is optional."""
    both = {"reward_names": ("RED", "MEAN")}
    backend = fake_backends.Bad()
    with _serving(backend) as server:
        with RewardClient(server.address, **both) as client:
            assert _submit(client, prompt="nan").result(20.0).code == types.INTERNAL
        assert backend.calls == 1
        with RewardClient(server.address, **both, optional_names=("RED",)) as client:
            lacking, whole = _submit(client, prompt="nan"), _submit(client, prompt="a red disk")
            lacking, whole = lacking.result(20.0), whole.result(20.0)
        assert lacking.ok
        assert lacking.attempts == 2
        mean = fake_backends.clip(0).mean(dtype=np.float64) - 100.0
        assert lacking.scores == pytest.approx({"MEAN": mean})
        assert set(whole.scores) == {"MEAN", "RED"}
        assert whole.attempts == 1
        # One that is needed fails the sample, and so does a backend that gives nothing.
        with RewardClient(server.address, **both, optional_names=("MEAN",)) as client:
            assert _submit(client, prompt="nan").result(20.0).code == types.INTERNAL
            assert _submit(client, prompt="raise").result(20.0).code == types.INTERNAL


@pytest.mark.parametrize("optional", [("RED", "MEAN"), ("BLUE",)])
def test_optional_rewards_are_some_of_those_asked_for(optional):
    with pytest.raises(ValueError, match=r"optional_names = .* must be some of reward_names"):
        RewardClient("a:1", reward_names=("RED", "MEAN"), optional_names=optional)


def test_the_frames_may_be_reused_after_submit():
    video = fake_backends.clip()
    mean = video.mean(dtype=np.float64)
    backend = fake_backends.Slow(0.1)
    with _serving(backend) as server, RewardClient(server.address) as client:
        future = client.submit(video, "a red disk", "run/0/0", 8.0)
        video[...] = 0
        np.testing.assert_allclose(future.result(20.0).raw["MEAN"], mean)


def test_several_calls_are_in_flight_and_no_more_than_allowed():
    backend = fake_backends.Slow(10.0)
    with (
        _serving(backend, max_workers=8) as server,
        RewardClient(server.address, max_in_flight=3) as client,
    ):
        results = [_submit(client, seed) for seed in range(6)]
        deadline = time.monotonic() + 5.0
        while backend.running < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert backend.running == 3
        backend.release.set()
        assert all(future.result(20.0).ok for future in results)
    assert backend.most_running == 3


def test_info_tells_what_is_served():
    with (
        _serving(fake_backends.Mean("f-1"), name="mean", max_queue=7) as server,
        RewardClient(server.address) as client,
    ):
        info = client.info()
        assert info.fingerprint == client.fingerprint == "f-1"
    assert info.names == ("MEAN", "RED")
    assert (info.backend, info.max_queue) == ("mean", 7)
    assert info.max_message_bytes == types.MAX_MESSAGE_BYTES


def test_info_waits_for_the_warm_up():
    server = RewardServer(fake_backends.Mean())
    server.start()
    warming = threading.Timer(0.3, server.warm_up)
    warming.start()
    with RewardClient(server.address, budget=10.0) as client:
        assert client.info().names == ("MEAN", "RED")
    warming.join()
    server.stop(0.0)


def test_info_raises_when_the_server_cannot_be_used():
    with (
        RewardClient(f"127.0.0.1:{_free_port()}", budget=0.3) as client,
        pytest.raises(types.RewardServiceError) as error,
    ):
        client.info()
    assert error.value.code == types.UNAVAILABLE
    with (
        _serving(fake_backends.Mean("new")) as server,
        RewardClient(server.address, expected_fingerprint="old") as client,
        pytest.raises(types.RewardServiceError, match=r"'new'.*'old'") as error,
    ):
        client.info()
    assert error.value.code == types.FAILED_PRECONDITION


@pytest.mark.parametrize("prompt", ["", "two\nlines"])
def test_wrong_requests_are_not_repeated(prompt):
    with _serving(fake_backends.Mean()) as server, RewardClient(server.address) as client:
        result = _submit(client, prompt=prompt).result(20.0)
        assert server.counts == {"INVALID_ARGUMENT": 1}
    assert (result.ok, result.code, result.attempts) == (False, types.INVALID_ARGUMENT, 1)
    assert "prompt" in result.message
    assert result.scores == {}


def test_unknown_rewards_are_invalid():
    with _serving(fake_backends.Mean()) as server:
        result = _one(server.address, reward_names=("BLUE",))
        assert result.code == types.INVALID_ARGUMENT
        assert set(_one(server.address, reward_names=("RED",)).scores) == {"RED"}


def test_a_video_that_cannot_be_sent_is_a_failed_sample():
    with RewardClient("127.0.0.1:1") as client:
        result = client.submit(np.zeros((3, 8, 8, 3)), "a", "b", 8.0).result(1.0)
    assert (result.ok, result.code, result.attempts) == (False, types.INVALID_ARGUMENT, 0)
    assert "float64" in result.message


@pytest.mark.parametrize("prompt", ["nan", "infinite raw", "raise", "missing", "plain float"])
def test_a_sample_that_the_backend_fails_has_no_score_and_leaves_others_alone(prompt):
    backend = fake_backends.Bad()
    with _serving(backend) as server, RewardClient(server.address) as client:
        bad, good = _submit(client, prompt=prompt), _submit(client, 1)
        result = bad.result(20.0)
        assert good.result(20.0).ok
    assert (result.ok, result.code, result.attempts) == (False, types.INTERNAL, 1)
    assert result.scores == {}
    assert result.raw == {}
    assert result.fingerprint == "mean-1"
    assert backend.calls == 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("wrong request", types.DATA_LOSS),
        ("wrong video", types.DATA_LOSS),
        ("another model", types.FAILED_PRECONDITION),
        ("no model", types.FAILED_PRECONDITION),
        ("nan", types.INTERNAL),
        ("failed", types.INTERNAL),
        ("empty", types.DATA_LOSS),
    ],
)
def test_answers_are_not_trusted(fault, code):
    script = Script(fault=lambda phase, sample: fault)
    with scripted(script) as address:
        result = _one(address, expected_fingerprint="model-a")
    assert (result.ok, result.code, result.scores) == (False, code, {})
    assert len(script.times) == 1


def test_other_rewards_than_those_asked_for_are_refused():
    """A server that ignores the names would train on what it likes."""
    with scripted(Script()) as address:
        names = _one(address).scores
        assert len(names) > 1
        result = _one(address, reward_names=("not these",))
    assert (result.ok, result.code, result.scores) == (False, types.DATA_LOSS, {})


@pytest.mark.parametrize(
    "code",
    [CODE.UNAVAILABLE, CODE.RESOURCE_EXHAUSTED, CODE.DEADLINE_EXCEEDED, CODE.CANCELLED],
)
def test_passing_failures_are_repeated(code):
    script = Script([code, code])
    with scripted(script) as address:
        result = _one(address)
    assert (result.ok, result.attempts, len(script.times)) == (True, 3, 3)


@pytest.mark.parametrize(
    "code", [CODE.FAILED_PRECONDITION, CODE.INTERNAL, CODE.UNKNOWN, CODE.UNIMPLEMENTED]
)
def test_other_failures_are_final(code):
    script = Script([code])
    with scripted(script) as address:
        result = _one(address)
    assert (result.ok, result.code, len(script.times)) == (False, code.name, 1)


def test_pauses_grow_and_follow_the_server_hint():
    hinted = Script([CODE.RESOURCE_EXHAUSTED], pushback_ms=600)
    with scripted(hinted) as address:
        assert _one(address).ok
    assert 0.3 <= hinted.times[1] - hinted.times[0] <= 1.2
    plain = Script([CODE.UNAVAILABLE] * 3)
    with scripted(plain) as address:
        assert _one(address).ok
    pauses = np.diff(plain.times)
    for attempt, pause in enumerate(pauses):
        assert 0.04 * 2**attempt <= pause <= 0.16 * 2**attempt + 0.3
    assert pauses[-1] > pauses[0]


def test_a_server_slower_than_the_timeout_is_asked_again_and_answers_from_its_cache():
    backend = fake_backends.Slow(0.5)
    with _serving(backend, max_workers=1) as server:
        result = _one(server.address, timeout=0.3, budget=10.0)
    assert result.ok
    assert result.attempts >= 2


def test_a_spent_budget_is_a_failed_sample(caplog):
    address = f"127.0.0.1:{_free_port()}"
    with (
        caplog.at_level(logging.WARNING),
        RewardClient(address, budget=1.0, heartbeat=0.3) as client,
    ):
        results = [_submit(client, seed) for seed in range(12)]
        results = [future.result(20.0) for future in results]
    for result in results:
        assert (result.ok, result.code, result.scores) == (False, types.UNAVAILABLE, {})
        assert 0.9 < result.seconds < 2.0
    lines = [line for line in caplog.messages if "calls waiting" in line]
    assert 2 <= len(lines) <= 4, caplog.messages
    assert address in lines[0]
    assert types.UNAVAILABLE in lines[0]


def test_the_last_code_is_kept_when_the_budget_ends():
    script = Script([CODE.RESOURCE_EXHAUSTED] * 100)
    with scripted(script) as address:
        result = _one(address, budget=0.5)
    assert (result.ok, result.code) == (False, types.RESOURCE_EXHAUSTED)
    backend = fake_backends.Slow(10.0)
    with _serving(backend) as server:
        result = _one(server.address, timeout=0.2, budget=0.7)
        backend.release.set()
    assert (result.ok, result.code) == (False, types.DEADLINE_EXCEEDED)


def test_a_full_queue_slows_the_client_down_without_a_failure():
    backend = fake_backends.Slow(0.05)
    with (
        _serving(backend, max_workers=1, max_queue=1) as server,
        RewardClient(server.address, max_in_flight=8) as client,
    ):
        results = [_submit(client, seed) for seed in range(10)]
        results = [future.result(20.0) for future in results]
        assert server.counts["RESOURCE_EXHAUSTED"] > 0
    assert all(result.ok for result in results)
    assert backend.calls == 10


def test_a_server_that_returns_on_its_address_loses_nothing(caplog):
    first = RewardServer(fake_backends.Slow(0.05), max_workers=1)
    address = first.start()
    first.warm_up()
    with (
        caplog.at_level(logging.WARNING),
        RewardClient(address, max_in_flight=4, budget=20.0) as client,
    ):
        results = [_submit(client, seed) for seed in range(20)]
        results[2].result(20.0)
        first.stop(grace=0.0)
        assert not all(future.done() for future in results)
        time.sleep(0.5)
        port = int(address.rpartition(":")[2])
        with _serving(fake_backends.Mean(), port=port):
            results = [future.result(20.0) for future in results]
    assert all(result.ok for result in results), [result.message for result in results]
    assert max(result.attempts for result in results) > 1
    assert any("answers again" in line for line in caplog.messages)


def test_another_model_on_the_same_address_is_a_failed_precondition():
    first = RewardServer(fake_backends.Mean("f-1"))
    address = first.start()
    first.warm_up()
    with RewardClient(address, budget=20.0) as client:
        assert _submit(client).result(20.0).ok
        first.stop(grace=0.0)
        with _serving(fake_backends.Mean("f-2"), port=int(address.rpartition(":")[2])):
            result = _submit(client, 1).result(20.0)
    assert (result.ok, result.code) == (False, types.FAILED_PRECONDITION)
    assert "f-1" in result.message
    assert "f-2" in result.message


def test_oversize_is_final_on_either_side():
    with _serving(fake_backends.Mean(), max_message_bytes=2048) as server:
        here = _one(server.address, max_message_bytes=2048)
        there = _one(server.address)
        assert (here.code, here.attempts) == (types.INVALID_ARGUMENT, 0)
        assert (there.code, there.attempts) == (types.INVALID_ARGUMENT, 1)
    assert "2048" in here.message
    assert "2048" in there.message


def test_close_ends_what_waits():
    backend = fake_backends.Slow(10.0)
    with _serving(backend) as server:
        client = RewardClient(server.address, max_in_flight=2)
        results = [_submit(client, seed) for seed in range(5)]
        while backend.running < 2:
            time.sleep(0.01)
        started = time.monotonic()
        client.close()
        client.close()
        assert time.monotonic() - started < 2.0
        backend.release.set()
    assert {future.result(1.0).code for future in results} == {types.CANCELLED}
    with pytest.raises(RuntimeError, match="submit after close"):
        _submit(client)


def test_close_does_not_wait_for_a_server_that_is_away():
    client = RewardClient(f"127.0.0.1:{_free_port()}")
    results = [_submit(client, seed) for seed in range(20)]
    time.sleep(0.2)
    client.close()
    assert {future.result(1.0).code for future in results} == {types.CANCELLED}
    RewardClient("127.0.0.1:1").close()


@pytest.mark.parametrize(
    ("option", "value"),
    [("timeout", 0.0), ("budget", float("nan")), ("heartbeat", -1.0), ("max_in_flight", 0)],
)
def test_options_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option} = "):
        RewardClient("127.0.0.1:1", **{option: value})


def test_a_program_ends_without_close_and_without_jax():
    program = f"""
import sys
import numpy as np
from sage_grpo_jax.rewards.client import RewardClient
client = RewardClient("127.0.0.1:{_free_port()}")
future = client.submit(np.zeros((2, 8, 8, 3), np.uint8), "a", "b", 8.0)
assert "jax" not in sys.modules
raise SystemExit(7)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == 7, done.stderr.decode()
    assert time.monotonic() - started < 10.0
