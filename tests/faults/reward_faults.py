"""A reward service over gRPC whose samples go wrong in the ways that they are told to."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc

from sage_grpo_jax.rewards import reward_pb2, reward_pb2_grpc

NAMES = ("VQ", "MQ", "TA")


class Faulty(reward_pb2_grpc.RewardServiceServicer):
    """Scores by the digest of the request; `fault(phase, sample)` names what goes wrong, or "".

    The phase is the start of the request id ("step0", "eval0"), the sample its end.
    """

    def __init__(self, fault: Callable[[str, int], str] = lambda phase, sample: "") -> None:
        self.fault = fault
        self.fingerprint = "model-a"

    def GetInfo(self, request, context):
        return reward_pb2.GetInfoResponse(fingerprint=self.fingerprint, reward_names=NAMES)

    def Score(self, request, context):
        phase, _, rest = request.request_id.partition("/")
        fault = self.fault(phase, int(rest.rpartition("/")[2]))
        response = reward_pb2.ScoreResponse(
            request_id=request.request_id, digest=request.digest, fingerprint=self.fingerprint
        )
        digest = hashlib.sha256(request.digest).digest()
        for place, name in enumerate(NAMES):
            value = digest[place] / 128 - 1
            response.rewards.add(name=name, raw=value, normalised=value)
        if fault == "nan":
            response.rewards[1].normalised = float("nan")
        elif fault == "wrong request":
            response.request_id = "step0/somebody/0"
        elif fault == "wrong video":
            response.digest = b"another"
        elif fault == "incomplete":
            del response.rewards[2]
        elif fault == "failed":
            response.status.code = grpc.StatusCode.INTERNAL.value[0]
            response.ClearField("rewards")
        elif fault == "slow":
            time.sleep(1.0)
        elif fault == "another model":
            self.fingerprint = response.fingerprint = "model-b"
        return response


@contextlib.contextmanager
def serving(service: Faulty) -> Iterator[str]:
    """Serves it; yields its address."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
