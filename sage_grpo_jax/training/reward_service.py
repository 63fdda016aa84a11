"""The reward service of a run: its own or one elsewhere, found before anything expensive."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from absl import logging

from sage_grpo_jax.config import schema
from sage_grpo_jax.rewards import client as client_lib
from sage_grpo_jax.rewards import supervisor
from sage_grpo_jax.rewards import types as reward_types
from sage_grpo_jax.training import checkpoint

# How long a run that has not begun looks for its reward service: by then the address is wrong.
FIRST_CONTACT_SECONDS = 120.0


@contextlib.contextmanager
def open_scorer(config: schema.Config, workdir: pathlib.Path) -> Iterator[client_lib.RewardClient]:
    """A client of the reward service; starts the service when `rewards.spawn`.

    Raises:
      ValueError: no such service at `rewards.address`, or one that lacks a reward. A run that
        has begun before waits for its service as long as for a reward.
      RewardServiceError: it does not come up, or stays away.
    """
    rewards = config.rewards
    wanted = tuple(rewards.weights)
    with contextlib.ExitStack() as stack:
        # The stack closes in reverse: the client goes before the service that it talks to.
        address = rewards.address
        if rewards.spawn:
            address = stack.enter_context(_own_server(rewards, workdir)).address

        client = client_lib.RewardClient(
            address,
            timeout=rewards.timeout_seconds,
            budget=rewards.budget_seconds,
            max_in_flight=rewards.max_in_flight,
            reward_names=wanted,
            optional_names=[name for name in wanted if name not in rewards.optimised],
        )
        stack.callback(client.close)

        info = _first_contact(client, rewards, begun=(workdir / checkpoint.FOLDER).is_dir())
        # It is refused here, before any weights are loaded; later every sample would lack the
        # reward.
        if missing := set(wanted) - set(info.names):
            raise ValueError(
                f"config.rewards.weights: got {', '.join(wanted)}; {address} does not score "
                f"{', '.join(sorted(missing))}; allowed: {', '.join(info.names)}"
            )
        logging.info("rewards from %s, fingerprint %s", address, info.fingerprint[:16])
        yield client


def _own_server(rewards: schema.RewardsConfig, workdir: pathlib.Path) -> supervisor.KeptServer:
    log = workdir / f"rewards-{jax.process_index()}.log"
    try:
        return supervisor.KeptServer(rewards.backend, log, rewards.silence_seconds)
    except (RuntimeError, OSError) as error:
        raise reward_types.RewardServiceError(reward_types.UNAVAILABLE, str(error)) from error


def _first_contact(
    client: client_lib.RewardClient, rewards: schema.RewardsConfig, begun: bool
) -> reward_types.RewardInfo:
    # A service may be away for a while in the life of a run, and is waited for; before the first
    # step a silence means that the address is wrong.
    patience = rewards.budget_seconds
    if not begun:
        patience = min(patience, FIRST_CONTACT_SECONDS)
    try:
        return client.info(patience)
    except reward_types.RewardServiceError as error:
        if rewards.spawn or (begun and error.code != reward_types.UNIMPLEMENTED):
            raise
        # What gRPC says may have several lines.
        raise ValueError(
            f"config.rewards.address: got {rewards.address!r}, where no reward service answers "
            f"({' '.join(str(error).split())}); allowed: HOST:PORT of a running "
            "python -m sage_grpo_jax.serve_rewards"
        ) from error
