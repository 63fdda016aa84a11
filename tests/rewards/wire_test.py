"""The message schema, the digest, and what a request may contain."""

import pathlib
import re

import fake_backends
import numpy as np
import pytest

from sage_grpo_jax.rewards import reward_pb2, wire
from sage_grpo_jax.rewards.backends import Limits

PROTO = pathlib.Path(reward_pb2.__file__).with_name("reward.proto")


def _all_frames(total: int, fps: float) -> range:
    del fps
    return range(total)


def _request(**changes) -> reward_pb2.ScoreRequest:
    arguments = {"prompt": "a red disk", "request_id": "run/0/0", "fps": 8.0, **changes}
    return wire.make_request(fake_backends.clip(), **arguments)


def test_stubs_belong_to_the_proto_file():
    source = re.sub(r"//.*", "", PROTO.read_text())
    messages = re.findall(r"message (\w+) \{([^}]*)\}", source)
    assert {name for name, _ in messages} == set(reward_pb2.DESCRIPTOR.message_types_by_name)
    for name, body in messages:
        written = {(field, int(number)) for field, number in re.findall(r"(\w+) = (\d+);", body)}
        generated = reward_pb2.DESCRIPTOR.message_types_by_name[name].fields
        assert written == {(field.name, field.number) for field in generated}, name


def test_stubs_import_each_other_by_package_path():
    text = PROTO.with_name("reward_pb2_grpc.py").read_text()
    assert "from sage_grpo_jax.rewards import reward_pb2" in text


def test_frames_survive_the_trip():
    video = fake_backends.clip(seed=3)[:, :, :11]  # not square: the sides show
    request = wire.make_request(video[:, ::-1], "a", "b", 8.0)
    received = reward_pb2.ScoreRequest.FromString(request.SerializeToString())
    frames = wire.read_frames(received.frames)
    np.testing.assert_array_equal(frames, video[:, ::-1])
    assert not frames.flags.writeable


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a red disk."},
        {"fps": 8.000001},
        {"reward_names": ("VQ",)},
        {"reward_names": ("V", "Q")},
        {"frame_indices": (0, 1, 3), "total_frames": 4},
        {"total_frames": 4},
    ],
)
def test_digest_depends_on_everything_that_is_scored(changes):
    assert _request(**changes).digest != _request().digest


def test_digest_depends_on_shape_and_pixels_but_not_on_the_id():
    video = fake_backends.clip()
    digest = wire.make_request(video, "a", "b", 8.0).digest
    assert wire.make_request(video, "a", "another", 8.0).digest == digest
    shape = wire.make_request(video.reshape(3, 8, 32, 3), "a", "b", 8.0)
    assert shape.digest != digest
    video[2, 15, 15, 2] ^= 1
    assert wire.make_request(video, "a", "b", 8.0).digest != digest


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((3, 16, 16, 3), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((3, 16, 16, 4), np.uint8),
    ],
)
def test_only_uint8_rgb_videos_can_be_sent(video):
    with pytest.raises(ValueError, match="video = "):
        wire.make_request(video, "a", "b", 8.0)


@pytest.mark.parametrize("changes", [{"prompt": "\ud800"}, {"fps": "eight"}, {"request_id": None}])
def test_values_that_do_not_fit_their_field_are_named_errors(changes):
    if changes == {"request_id": None}:
        with pytest.raises(ValueError, match="request_id"):
            wire.check_request(_request(**changes), ("VQ",), Limits(), _all_frames)
    else:
        with pytest.raises(ValueError, match="wrong type"):
            _request(**changes)


def test_a_plain_request_passes():
    wire.check_request(_request(), ("VQ",), Limits(), _all_frames)
    named = _request(reward_names=("VQ",), prompt="ein blauer Würfel, 左へ 🚀")
    wire.check_request(named, ("VQ", "MQ"), Limits(), _all_frames)


def test_a_backend_that_samples_frames_gets_exactly_those():
    def first_and_last(total, fps):
        return (0, total - 1)

    chosen = _request(frame_indices=(0, 5, 9), total_frames=10)
    with pytest.raises(ValueError, match=r"frame_indices = \[0, 5, 9\].*\[0, 9\]"):
        wire.check_request(chosen, ("VQ",), Limits(), first_and_last)
    two = wire.make_request(
        fake_backends.clip()[:2], "a", "b", 8.0, frame_indices=(0, 9), total_frames=10
    )
    wire.check_request(two, ("VQ",), Limits(), first_and_last)
