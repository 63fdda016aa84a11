"""What the reward client hands to its caller, and the constants that both ends share."""

import dataclasses

SERVICE_NAME = "sage_grpo_jax.reward.v1.RewardService"
# gRPC's own default is 4 MiB, less than six sampled frames at 480p.
MAX_MESSAGE_BYTES = 64 * 2**20

# Codes of `RewardResult.code` and `RewardServiceError.code`: gRPC's names.
OK = "OK"
INVALID_ARGUMENT = "INVALID_ARGUMENT"  # the request is wrong
FAILED_PRECONDITION = "FAILED_PRECONDITION"  # another fingerprint: the reward model has changed
RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"  # queue full until the budget was spent, or too large
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"  # too slow until the budget was spent
UNAVAILABLE = "UNAVAILABLE"  # not reachable until the budget was spent
UNIMPLEMENTED = "UNIMPLEMENTED"  # a gRPC server, but another service
INTERNAL = "INTERNAL"  # the backend failed on this sample, or returned a non-finite score
DATA_LOSS = "DATA_LOSS"  # the answer belongs to another request
CANCELLED = "CANCELLED"  # the client was closed first


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """The outcome for one sample; a failed one carries no scores, so that it cannot be used as 0.

    Attributes:
      ok: whether `scores` holds every reward that was asked for and is not optional, all finite.
      code: "OK", or why not (the names above).
      message: what went wrong, for a log.
      scores: normalised score by reward name.
      raw: the same in the backend's own units.
      fingerprint: of the reward model that answered; "" when none did.
      seconds: from `submit` to this result, waiting included.
      server_seconds: of which the backend spent scoring.
      attempts: calls made.
      warnings: what looks wrong about a video that was scored all the same.
    """

    ok: bool
    code: str
    message: str = ""
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    raw: dict[str, float] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    seconds: float = 0.0
    server_seconds: float = 0.0
    attempts: int = 0
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RewardInfo:
    """What a server scores with.

    Attributes:
      fingerprint: changes whenever the same video could get another score.
      names: the rewards it returns.
      backend: its name.
      max_message_bytes: the largest request that it takes.
      max_workers: videos scored at the same time.
      max_queue: videos waiting before it answers RESOURCE_EXHAUSTED.
    """

    fingerprint: str
    names: tuple[str, ...]
    backend: str
    max_message_bytes: int
    max_workers: int
    max_queue: int


class RewardServiceError(RuntimeError):
    """The service as a whole cannot be used (never raised for a single sample)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
