"""A reward service that does as it is told, to test what a client makes of it."""

import contextlib
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

from sage_grpo_jax.rewards import reward_pb2, reward_pb2_grpc


class Script(reward_pb2_grpc.RewardServiceServicer):
    """Fails with the given codes, then answers; `change` may falsify an answer."""

    def __init__(self, codes=(), change=None, pushback_ms=None):
        self.codes = list(codes)
        self.change = change
        self.pushback_ms = pushback_ms
        self.times = []

    def Score(self, request, context):
        self.times.append(time.monotonic())
        if self.codes:
            if self.pushback_ms is not None:
                context.set_trailing_metadata((("retry-pushback-ms", str(self.pushback_ms)),))
            context.abort(self.codes.pop(0), "as scripted")
        response = reward_pb2.ScoreResponse(
            request_id=request.request_id, digest=request.digest, fingerprint="scripted"
        )
        response.rewards.add(name="MEAN", raw=1.0, normalised=2.0)
        if self.change is not None:
            self.change(response)
        return response


@contextlib.contextmanager
def scripted(script: Script) -> Iterator[str]:
    """Serves the script; yields its address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
