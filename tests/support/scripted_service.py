"""A reward service over gRPC that does as it is told, well or badly."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import grpc

from sage_grpo_jax.rewards import reward_pb2, reward_pb2_grpc

NAMES = ("VQ", "MQ", "TA")
FINGERPRINT, OTHER_FINGERPRINT = "model-a", "model-b"


def _set(**fields) -> Callable:
    def change(response):
        for field, value in fields.items():
            setattr(response, field, value)

    return change


def _nan(response):
    response.rewards[1].normalised = float("nan")


def _incomplete(response):
    del response.rewards[2]


def _empty(response):
    del response.rewards[:]


def _failed(response):
    response.status.code = grpc.StatusCode.INTERNAL.value[0]
    response.ClearField("rewards")


# What can go wrong with an answer.
FAULTS: dict[str, Callable[[reward_pb2.ScoreResponse], None]] = {
    "": lambda response: None,
    "nan": _nan,
    "incomplete": _incomplete,
    "empty": _empty,
    "failed": _failed,
    "slow": lambda response: time.sleep(1.0),
    "wrong request": _set(request_id="step0/somebody/0"),
    "wrong video": _set(digest=b"1" * 32),
    "another model": _set(fingerprint=OTHER_FINGERPRINT),
    "no model": _set(fingerprint=""),
}


class Script(reward_pb2_grpc.RewardServiceServicer):
    """Scores by the digest of the request.

    Args:
      codes: of the first calls, which fail.
      fault: (phase, sample) -> a name of `FAULTS`, for the answers; the phase is the start of the
        request id ("step0", "eval0"), the sample its end.
      pushback_ms: the hint when to come back that goes with a code.

    Attributes:
      fingerprint: of the reward model; after the fault "another model" that of the other one.
      times: when it was asked for a score.
    """

    def __init__(
        self,
        codes: Sequence[grpc.StatusCode] = (),
        fault: Callable[[str, int], str] = lambda phase, sample: "",
        pushback_ms: int | None = None,
    ) -> None:
        self.codes = list(codes)
        self.fault = fault
        self.pushback_ms = pushback_ms
        self.fingerprint = FINGERPRINT
        self.times: list[float] = []

    def GetInfo(self, request, context):
        return reward_pb2.GetInfoResponse(fingerprint=self.fingerprint, reward_names=NAMES)

    def Score(self, request, context):
        self.times.append(time.monotonic())
        if self.codes:
            if self.pushback_ms is not None:
                context.set_trailing_metadata((("retry-pushback-ms", str(self.pushback_ms)),))
            context.abort(self.codes.pop(0), "as scripted")
        response = reward_pb2.ScoreResponse(
            request_id=request.request_id, digest=request.digest, fingerprint=self.fingerprint
        )
        digest = hashlib.sha256(request.digest).digest()
        for place, name in enumerate(NAMES):
            value = digest[place] / 128 - 1
            response.rewards.add(name=name, raw=value, normalised=value)
        phase, _, rest = request.request_id.partition("/")
        FAULTS[self.fault(phase, int(rest.rpartition("/")[2]))](response)
        if response.fingerprint == OTHER_FINGERPRINT:
            self.fingerprint = OTHER_FINGERPRINT
        return response


@contextlib.contextmanager
def scripted(script: Script) -> Iterator[str]:
    """Serves the script; yields its address."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
