"""Between numpy clips and messages: building, digesting, checking and reading score requests."""

import hashlib
import math
import struct
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from sage_grpo_jax.rewards import reward_pb2
from sage_grpo_jax.rewards.backends.base import Limits

MAX_REQUEST_ID = 256
# Control characters, surrogates, line and paragraph separators: a prompt is one line of text.
_FORBIDDEN_CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))


def make_request(
    video_uint8_FxHxWx3: np.ndarray,
    prompt: str,
    request_id: str,
    fps: float,
    *,
    reward_names: Sequence[str] = (),
    frame_indices: Sequence[int] | None = None,
    total_frames: int | None = None,
) -> reward_pb2.ScoreRequest:
    """Builds a request with its digest; copies the frames.

    Args:
      video_uint8_FxHxWx3: the frames to send.
      prompt: the caption of the clip.
      request_id: names the sample in logs, for instance "run/step/sample".
      fps: frames per second of the whole clip.
      reward_names: rewards wanted; () means all.
      frame_indices: which frames of the whole clip these are; None: all, in order.
      total_frames: length of the whole clip; None: that of the video.

    Raises:
      ValueError: the video is not uint8 [F, H, W, 3], or a value does not fit its field.
    """
    video = np.asarray(video_uint8_FxHxWx3)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(
            f"video = {video.dtype} {list(video.shape)}: must be uint8 [frames, height, width, 3]"
        )

    frames, height, width, channels = video.shape
    try:
        request = reward_pb2.ScoreRequest(
            request_id=request_id,
            prompt=prompt,
            frames=reward_pb2.VideoFrames(
                data=video.tobytes(),
                num_frames=frames,
                height=height,
                width=width,
                channels=channels,
                layout=reward_pb2.LAYOUT_THWC,
                data_type=reward_pb2.DATA_TYPE_UINT8,
                frame_indices=range(frames) if frame_indices is None else frame_indices,
                total_frames=frames if total_frames is None else total_frames,
                source_fps=fps,
            ),
            reward_names=reward_names,
        )
    # What protobuf refuses: another type, a number out of range, text that is not Unicode.
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"request_id = {request_id!r}: a field has a wrong type: {error}"
        ) from None

    request.digest = request_digest(request)
    return request


def request_digest(request: reward_pb2.ScoreRequest) -> bytes:
    """SHA-256 of all that decides the scores: frames, prompt, shape, timing, reward names.

    Each part is preceded by its length, so no two requests share a stream of bytes. The id and the
    expected fingerprint are not part of it: the same clip has the same digest in every run.
    """
    frames = request.frames
    # All in 64 bits and little-endian below: the same bytes on every machine.
    integers = (
        *(frames.num_frames, frames.height, frames.width, frames.channels),
        *(frames.layout, frames.data_type, frames.total_frames),
        *frames.frame_indices,
    )
    digest = hashlib.sha256()
    for part in (
        b"sage_grpo_jax.reward.v1",
        frames.data,
        request.prompt.encode(),
        struct.pack(f"<{len(integers)}q", *integers),
        struct.pack("<d", frames.source_fps),
        *(name.encode() for name in request.reward_names),
    ):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def read_frames(frames: reward_pb2.VideoFrames) -> np.ndarray:
    """The frames of a checked request as a read-only uint8 [F, H, W, 3] view."""
    shape = (frames.num_frames, frames.height, frames.width, frames.channels)
    return np.frombuffer(frames.data, np.uint8).reshape(shape)


def check_request(
    request: reward_pb2.ScoreRequest,
    names: Sequence[str],
    limits: Limits,
    frame_indices: Callable[[int, float], Sequence[int]],
) -> None:
    """Refuses everything that a backend should never see, cheapest checks first.

    Args:
      request: as received.
      names: the rewards that the backend has.
      limits: the sizes that it takes.
      frame_indices: (total frames, fps) -> the frames that it looks at.

    Raises:
      ValueError: names the field, its value and what is allowed.
    """
    _check_text("request_id", request.request_id, MAX_REQUEST_ID)
    _check_text("prompt", request.prompt, limits.max_prompt_bytes)
    _check_names(request.reward_names, names)
    _check_shape(request.frames, limits)
    _check_timing(request.frames, limits, frame_indices)
    if request.digest != request_digest(request):
        raise ValueError("digest does not match the content: the request was damaged on its way")


def _check_text(field: str, text: str, max_bytes: int) -> None:
    if not text.strip():
        raise ValueError(f"{field} = {text[:20]!r}: must not be empty")
    size = len(text.encode())
    if size > max_bytes:
        raise ValueError(f"{field} has {size} bytes: at most {max_bytes} are allowed")
    for position, character in enumerate(text):
        if unicodedata.category(character) in _FORBIDDEN_CATEGORIES:
            raise ValueError(
                f"{field} has the control character U+{ord(character):04X} at position {position}: "
                "must be one line of plain text"
            )


def _check_names(wanted: Sequence[str], names: Sequence[str]) -> None:
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise ValueError(f"reward_names = {unknown}: allowed are {list(names)}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"reward_names = {list(wanted)}: must be distinct")


def _check_shape(frames: reward_pb2.VideoFrames, limits: Limits) -> None:
    # The kind of data.
    if frames.layout != reward_pb2.LAYOUT_THWC:
        raise ValueError(f"frames.layout = {frames.layout}: must be {reward_pb2.LAYOUT_THWC}")
    if frames.data_type != reward_pb2.DATA_TYPE_UINT8:
        raise ValueError(
            f"frames.data_type = {frames.data_type}: must be {reward_pb2.DATA_TYPE_UINT8}"
        )
    if frames.channels != 3:
        raise ValueError(f"frames.channels = {frames.channels}: must be 3")

    # The sizes that the backend takes.
    _check_range("frames.num_frames", frames.num_frames, limits.min_frames, limits.max_frames)
    _check_range("frames.height", frames.height, limits.min_side, limits.max_side)
    _check_range("frames.width", frames.width, limits.min_side, limits.max_side)

    sides = sorted((frames.height, frames.width))
    if sides[1] > limits.max_aspect * sides[0]:
        raise ValueError(
            f"frames are {frames.height} x {frames.width}: "
            f"the longer side may be at most {limits.max_aspect} times the shorter"
        )

    # Sizes that lie about the data. Python's integers cannot overflow into a match.
    expected = frames.num_frames * frames.height * frames.width * frames.channels
    if len(frames.data) != expected:
        raise ValueError(
            f"frames.data has {len(frames.data)} bytes: the shape [{frames.num_frames}, "
            f"{frames.height}, {frames.width}, {frames.channels}] needs {expected}"
        )


def _check_timing(
    frames: reward_pb2.VideoFrames,
    limits: Limits,
    frame_indices: Callable[[int, float], Sequence[int]],
) -> None:
    fps = frames.source_fps
    if not (math.isfinite(fps) and 0.0 < fps <= limits.max_fps):
        raise ValueError(f"frames.source_fps = {fps}: must be above 0 and at most {limits.max_fps}")
    # Before the indices: they would be made for any number of frames.
    _check_range(
        "frames.total_frames", frames.total_frames, frames.num_frames, limits.max_total_frames
    )

    # Clients send the frames that the backend itself chooses. Else scores would depend on who asks.
    canonical = [int(index) for index in frame_indices(frames.total_frames, fps)]
    if list(frames.frame_indices) != canonical:
        raise ValueError(
            f"frames.frame_indices = {_short(frames.frame_indices)}: for {frames.total_frames} "
            f"frames at {fps} fps the backend looks at {_short(canonical)}"
        )

    if len(canonical) != frames.num_frames:
        raise ValueError(
            f"frames.num_frames = {frames.num_frames}: frame_indices has {len(canonical)}"
        )


def _check_range(field: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{field} = {value}: must be from {lowest} to {highest}")


def _short(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:8])
    return f"[{shown}{', ...' if len(indices) > 8 else ''}]"
