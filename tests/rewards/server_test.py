"""The server over real gRPC: readiness, validation, queueing, failures, draining."""

import contextlib
import re
import threading
import time

import fake_backends
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sage_grpo_jax.rewards import reward_pb2, reward_pb2_grpc, types, wire
from sage_grpo_jax.rewards import server as server_lib
from sage_grpo_jax.rewards.backends import create

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CODE = grpc.StatusCode


@contextlib.contextmanager
def _serving(backend, warm=True, channel_options=(), **options):
    server = server_lib.RewardServer(backend, **options)
    server.start()
    if warm:
        server.warm_up()
    local = (("grpc.use_local_subchannel_pool", 1), *channel_options)
    with grpc.insecure_channel(server.address, local) as channel:
        yield server, reward_pb2_grpc.RewardServiceStub(channel), channel
    server.stop(grace=0.0)


def _request(seed=0, prompt="a red disk", **changes):
    return wire.make_request(
        fake_backends.clip(seed), prompt, f"test/{seed}", changes.pop("fps", 8.0), **changes
    )


def _score(stub, request, timeout=60.0):
    return stub.Score(request, timeout=timeout)


def _health(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0).status


def _wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        time.sleep(0.005)


def test_health_follows_the_warm_up():
    with _serving(fake_backends.Mean(), warm=False) as (server, stub, channel):
        for service in ("", types.SERVICE_NAME):
            assert _health(channel, service) == NOT_SERVING
        for call in (
            lambda: _score(stub, _request()),
            lambda: stub.GetInfo(reward_pb2.GetInfoRequest(), timeout=5.0),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is CODE.UNAVAILABLE
        server.warm_up()
        for service in ("", types.SERVICE_NAME):
            assert _health(channel, service) == SERVING
        assert _score(stub, _request()).status.code == 0


@pytest.mark.parametrize("backend", [fake_backends.ColdFailure(), fake_backends.NaNWarmUp()])
def test_a_failed_warm_up_never_serves(backend):
    with _serving(backend, warm=False) as (server, _, channel):
        with pytest.raises((OSError, ValueError), match=r"no weights|finite"):
            server.warm_up()
        assert _health(channel, "") == NOT_SERVING


def test_an_answer_holds_scores_echoes_and_timings():
    request = _request(seed=5)
    with _serving(fake_backends.Mean("f-7")) as (_, stub, _):
        response = _score(stub, request)
    video = fake_backends.clip(5).astype(np.float64)
    rewards = {reward.name: reward for reward in response.rewards}
    np.testing.assert_allclose(rewards["MEAN"].raw, video.mean())
    np.testing.assert_allclose(rewards["MEAN"].normalised, video.mean() - 100.0)
    np.testing.assert_allclose(rewards["RED"].normalised, video[..., 0].mean() / 8.0)
    assert (response.request_id, response.digest) == ("test/5", request.digest)
    assert response.fingerprint == "f-7"
    assert response.status.code == 0
    assert not response.warnings
    assert 0 < response.timings.score_seconds <= response.timings.total_seconds


def test_only_the_rewards_that_were_asked_for_come_back_in_their_order():
    with _serving(fake_backends.Mean()) as (_, stub, _):
        names = [r.name for r in _score(stub, _request(reward_names=("RED",))).rewards]
        both = [r.name for r in _score(stub, _request(reward_names=("RED", "MEAN"))).rewards]
    assert names == ["RED"]
    assert both == ["RED", "MEAN"]


def test_info_describes_the_service():
    options = {"name": "mean", "max_workers": 3, "max_queue": 5}
    with _serving(fake_backends.Mean("f-8"), **options) as (_, stub, _):
        info = stub.GetInfo(reward_pb2.GetInfoRequest(), timeout=5.0)
    assert (info.fingerprint, info.backend) == ("f-8", "mean")
    assert list(info.reward_names) == ["MEAN", "RED"]
    assert (info.max_workers, info.max_queue) == (3, 5)
    assert info.max_message_bytes == 64 * 2**20


def _set(path, value):
    def change(request):
        *parents, field = path.split(".")
        for parent in parents:
            request = getattr(request, parent)
        if isinstance(value, list):
            del getattr(request, field)[:]
            getattr(request, field).extend(value)
        else:
            setattr(request, field, value)

    return change


INVALID = [
    ("prompt", ""),
    ("prompt", "   "),
    ("prompt", "x" * 8193),
    ("prompt", "a red\x00 disk"),
    ("prompt", "a red\ndisk"),
    ("prompt", "a red\u2028disk"),
    ("request_id", ""),
    ("request_id", "x" * 257),
    ("request_id", "a\tb"),
    ("reward_names", ["BLUE"]),
    ("reward_names", ["RED", "RED"]),
    ("frames.data", b"short"),
    ("frames.data", b"\0" * 3072),
    ("frames.num_frames", -3),
    ("frames.num_frames", 1),
    ("frames.height", 0),
    ("frames.height", 4),
    ("frames.width", 2**31 - 1),
    ("frames.channels", 4),
    ("frames.layout", 0),
    ("frames.data_type", 7),
    ("frames.source_fps", 0.0),
    ("frames.source_fps", -8.0),
    ("frames.source_fps", float("nan")),
    ("frames.source_fps", float("inf")),
    ("frames.source_fps", 1e9),
    ("frames.total_frames", 2),
    ("frames.total_frames", 5000),
    ("frames.frame_indices", []),
    ("frames.frame_indices", [0, 2, 1]),
    ("frames.frame_indices", [0, 1, 2, 3]),
    ("digest", b""),
    ("digest", b"0" * 32),
]


def test_wrong_requests_never_reach_the_backend():
    backend = fake_backends.Mean()
    with _serving(backend) as (server, stub, _):
        for field, value in INVALID:
            request = _request()
            _set(field, value)(request)
            if field != "digest":
                request.digest = wire.request_digest(request)
            with pytest.raises(grpc.RpcError) as error:
                _score(stub, request)
            assert error.value.code() is CODE.INVALID_ARGUMENT, (field, value)
            assert field.rpartition(".")[2] in error.value.details(), (field, value)
        with pytest.raises(grpc.RpcError) as error:
            _score(stub, reward_pb2.ScoreRequest())
        assert error.value.code() is CODE.INVALID_ARGUMENT
        assert server.counts == {"INVALID_ARGUMENT": len(INVALID) + 1}
    assert backend.calls == 0


def test_extreme_aspect_is_refused():
    video = np.zeros((2, 8, 2000, 3), np.uint8)
    with _serving(fake_backends.Mean()) as (_, stub, _), pytest.raises(grpc.RpcError) as error:
        _score(stub, wire.make_request(video, "a", "b", 8.0))
    assert "8 x 2000" in error.value.details()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("raise", "KeyError"),
        ("nan", "'RED'.*finite"),
        ("infinite raw", "'RED'.*finite"),
        ("missing", r"\['MEAN'\]"),
        ("extra", "BLUE"),
        ("plain float", "Score"),
    ],
)
def test_a_failing_sample_has_a_status_and_no_score(prompt, words):
    backend = fake_backends.Bad()
    with _serving(backend) as (server, stub, _):
        response = _score(stub, _request(prompt=prompt))
        assert response.status.code == CODE.INTERNAL.value[0]
        assert not response.rewards
        assert response.request_id == "test/0"
        assert response.fingerprint == "mean-1"
        assert re.search(words, response.status.message)
        # A failure is not remembered, and the next clip is scored.
        assert _score(stub, _request(prompt=prompt)).status.code == CODE.INTERNAL.value[0]
        assert _score(stub, _request()).status.code == 0
        assert server.counts == {"INTERNAL": 2, "OK": 1}
    assert backend.calls == 3


def test_another_fingerprint_is_refused():
    request = _request()
    request.expected_fingerprint = "mean-0"
    with _serving(fake_backends.Mean()) as (_, stub, _), pytest.raises(grpc.RpcError) as error:
        _score(stub, request)
    assert error.value.code() is CODE.FAILED_PRECONDITION
    assert "mean-1" in error.value.details()


def test_repeated_requests_are_answered_from_the_cache():
    backend = fake_backends.Mean()
    with _serving(backend, cache_size=2) as (_, stub, _):
        first = _score(stub, _request())
        again = _request()
        again.request_id = "another"
        second = _score(stub, again)
        assert backend.calls == 1
        assert second.request_id == "another"
        assert list(second.rewards) == list(first.rewards)
        for seed in (1, 2, 0):
            _score(stub, _request(seed))
        assert backend.calls == 4


def test_clips_are_scored_at_the_same_time():
    backend = fake_backends.Slow(10.0)
    with _serving(backend, max_workers=3) as (_, stub, _):
        calls = [stub.Score.future(_request(seed), timeout=60.0) for seed in range(3)]
        _wait_until(lambda: backend.running == 3)
        backend.release.set()
        assert all(call.result().status.code == 0 for call in calls)


def test_a_full_queue_turns_away_with_a_hint_and_stays_responsive():
    backend = fake_backends.Slow(10.0)
    with _serving(backend, max_workers=1, max_queue=2) as (server, stub, channel):
        accepted = [stub.Score.future(_request(seed), timeout=60.0) for seed in range(3)]
        _wait_until(lambda: server._service._slots._value == 0)
        with pytest.raises(grpc.RpcError) as error:
            _score(stub, _request(3))
        assert error.value.code() is CODE.RESOURCE_EXHAUSTED
        assert int(dict(error.value.trailing_metadata())[server_lib.PUSHBACK_KEY]) > 0
        assert _health(channel, "") == SERVING
        backend.release.set()
        assert all(call.result().status.code == 0 for call in accepted)
        assert _score(stub, _request(3)).status.code == 0
    assert backend.most_running == 1


def test_queued_work_without_a_waiting_client_is_dropped():
    backend = fake_backends.Slow(10.0)
    with _serving(backend, max_workers=1) as (server, stub, _):
        first = stub.Score.future(_request(0), timeout=60.0)
        _wait_until(lambda: backend.running == 1)
        cancelled = stub.Score.future(_request(1), timeout=60.0)
        expired = stub.Score.future(_request(2), timeout=0.2)
        _wait_until(lambda: server._service._workers._work_queue.qsize() == 2)
        cancelled.cancel()
        assert expired.exception().code() is CODE.DEADLINE_EXCEEDED
        time.sleep(0.1)
        backend.release.set()
        assert first.result().status.code == 0
        assert _score(stub, _request(3)).status.code == 0
    assert backend.calls == 2


def test_a_message_over_the_limit_is_refused():
    with _serving(fake_backends.Mean(), max_message_bytes=2048) as (_, stub, _):
        with pytest.raises(grpc.RpcError) as error:
            _score(stub, _request())
        assert error.value.code() is CODE.RESOURCE_EXHAUSTED
        assert "larger than max" in error.value.details()


def test_five_megabytes_pass_the_default_limits():
    video = np.zeros((7, 512, 512, 3), np.uint8)
    with _serving(fake_backends.Mean()) as (_, stub, _):
        response = _score(stub, wire.make_request(video, "a", "b", 8.0))
    assert response.status.code == 0
    assert list(response.warnings) == ["all pixels have the same colour"]


def test_a_still_clip_is_flagged():
    video = np.repeat(fake_backends.clip()[:1], 3, axis=0)
    with _serving(fake_backends.Mean()) as (_, stub, _):
        response = _score(stub, wire.make_request(video, "a", "b", 8.0))
    assert list(response.warnings) == ["all frames are the same"]


def test_a_second_server_cannot_share_the_port():
    with _serving(fake_backends.Mean()) as (server, _, _):
        port = int(server.address.rpartition(":")[2])
        second = server_lib.RewardServer(fake_backends.Mean(), port=port)
        with pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1:{port}"):
            second.start()


def test_stopping_finishes_accepted_calls_and_refuses_new_ones():
    backend = fake_backends.Slow(10.0)
    with _serving(backend) as (server, stub, _):
        accepted = stub.Score.future(_request(0), timeout=60.0)
        _wait_until(lambda: backend.running == 1)
        drained = []
        stopping = threading.Thread(target=lambda: drained.append(server.stop(grace=10.0)))
        stopping.start()

        def refused():
            call = stub.Score.future(_request(1), timeout=0.5)
            return call.code() is CODE.UNAVAILABLE

        _wait_until(refused)
        backend.release.set()
        assert accepted.result().status.code == 0
        stopping.join()
        assert drained == [True]


def test_stopping_gives_up_on_a_call_that_hangs():
    backend = fake_backends.Slow(10.0)
    with _serving(backend) as (server, stub, _):
        hanging = stub.Score.future(_request(0), timeout=60.0)
        _wait_until(lambda: backend.running == 1)
        started = time.monotonic()
        assert server.stop(grace=0.2) is False
        assert time.monotonic() - started < 2.0
        assert hanging.code() in (CODE.UNAVAILABLE, CODE.CANCELLED)
        backend.release.set()


def test_a_lost_backend_stops_serving():
    with _serving(fake_backends.Bad()) as (server, stub, channel):
        with pytest.raises(grpc.RpcError) as error:
            _score(stub, _request(prompt="lost"))
        assert error.value.code() is CODE.UNAVAILABLE
        assert server.lost.is_set()
        assert _health(channel, types.SERVICE_NAME) == NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            _score(stub, _request())
        assert error.value.code() is CODE.UNAVAILABLE


def test_a_backend_can_look_at_some_frames_only():
    video = fake_backends.clip()[:2]
    request = wire.make_request(video, "a", "b", 8.0, frame_indices=(0, 80), total_frames=81)
    with _serving(fake_backends.FirstAndLast()) as (_, stub, _):
        assert _score(stub, request).status.code == 0
        with pytest.raises(grpc.RpcError, match="frame_indices"):
            _score(stub, _request())


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_workers", 0), ("max_queue", -1), ("port", 70000), ("max_message_bytes", 2**31)],
)
def test_options_are_checked(option, value):
    with pytest.raises(ValueError, match=f"{option} = {value}"):
        server_lib.RewardServer(fake_backends.Mean(), **{option: value})


def test_registry_builds_by_name_and_by_path():
    assert create("fake_backends:Mean").fingerprint() == "mean-1"
    assert create("moving_shapes").names == ("VQ", "MQ", "TA")


@pytest.mark.parametrize(
    "name", ["nonsense", "", "no_such_module:X", "fake_backends:Nothing", "fake_backends:clip"]
)
def test_registry_refuses_other_names(name):
    with pytest.raises(ValueError, match="backend = "):
        create(name)


def test_registry_refuses_a_backend_without_names(monkeypatch):
    class Nameless(fake_backends.Mean):
        names = ()

    monkeypatch.setattr(fake_backends, "Nameless", Nameless, raising=False)
    with pytest.raises(ValueError, match="names = "):
        create("fake_backends:Nameless")
