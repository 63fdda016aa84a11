"""Checks of the fields of a config that depend on each other.

What a field may hold by itself stands beside it in `schema`. Every error names the field, the value
and what is allowed.
"""

from __future__ import annotations

import numpy as np

from sage_grpo_jax.config import methods
from sage_grpo_jax.config.schema import (
    Config,
    LoraConfig,
    LossConfig,
    RewardsConfig,
    RolloutConfig,
)
from sage_grpo_jax.flow import kinds, sde
from sage_grpo_jax.rewards import names
from sage_grpo_jax.rewards.backends import BACKENDS
from sage_grpo_jax.worlds.moving_shapes import spec


def validate(config: Config) -> None:
    """Checks the fields that depend on each other; each by itself is checked by `fields.build`.

    Raises:
      ValueError: with the field, its value and what is allowed.
    """
    if not isinstance(config.method, methods.Applied):
        raise ValueError(methods.name_alone(config.method))
    _validate_adapters(config.lora)
    _validate_sampler(config)
    _validate_ratio(config.loss)
    _validate_updates(config)
    if config.loss.objective == "nft":
        _validate_forward(config)
    _validate_batches(config)
    _validate_world(config)
    _validate_rewards(config.rewards)


def _validate_adapters(lora: LoraConfig) -> None:
    try:
        _ = lora.adapters
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    if lora.init and not lora.rank:
        raise ValueError(
            f"config.lora.init: got {lora.init!r} with lora.rank=0; allowed: adapters for a "
            "run that trains adapters"
        )


def _validate_batches(config: Config) -> None:
    for path, value in (
        ("loss.micro_batch", config.loss.micro_batch),
        ("rollout.decode_batch", config.rollout.decode_batch),
    ):
        if config.batch_size % value:
            raise ValueError(
                f"config.{path}: got {value}; allowed: a divisor of "
                f"prompts_per_step × group_size = {config.batch_size}"
            )


def _validate_world(config: Config) -> None:
    """What the evaluation measures of the moving-shapes world alone."""
    clip = (config.video.frames, config.video.height, config.video.width)
    world = (spec.NUM_FRAMES, spec.HEIGHT, spec.WIDTH)
    if config.eval.manifold_distance and clip != world:
        raise ValueError(
            f"config.eval.manifold_distance: got True with clips of {clip}; allowed: clips of the "
            f"moving-shapes world, {world}, or False"
        )
    if config.eval.shape_identity and clip[1:] != world[1:]:
        raise ValueError(
            f"config.eval.shape_identity: got True with frames of {clip[1:]}; allowed: frames of "
            f"the moving-shapes world, {world[1:]}, or False"
        )


def _validate_sampler(config: Config) -> None:
    rollout = config.rollout
    matched = bool(rollout.eta_match.kind)  # eta is not read
    kind, stochastic = sde.KINDS[rollout.sde], kinds.stochastic_kinds()

    # A group whose videos are all equal has no better and no worse.
    noiseless = not kind.stochastic or (rollout.eta == 0 and not matched)
    if noiseless and config.loss.objective != "nft":
        raise ValueError(
            f"config.rollout: sde={rollout.sde!r} with eta={rollout.eta} samples without noise, "
            f"so there is nothing to learn from; allowed: {', '.join(stochastic)} with eta > 0, or "
            "loss.objective=nft"
        )
    if noiseless and rollout.same_initial_noise:
        raise ValueError(
            f"config.rollout.same_initial_noise: got True with sde={rollout.sde!r} and "
            f"eta={rollout.eta}, which makes the videos of a group equal; allowed: False"
        )

    if (rollout.window == "all") != (rollout.window_size == 0):
        raise ValueError(
            f"config.rollout: window={rollout.window!r} with window_size={rollout.window_size}; "
            "allowed: all with 0, the others with at least 1"
        )

    # The noise level, and what only some kinds of SDE read
    if matched and rollout.eta_match.eta == 0:
        raise ValueError("config.rollout.eta_match.eta: got 0; allowed: more than 0")
    if rollout.eta > kind.highest_eta and not matched:
        raise ValueError(
            f"config.rollout.eta: got {rollout.eta}; allowed with sde={rollout.sde}: 0 to "
            f"{kind.highest_eta:g}"
        )
    if rollout.clamp and not kind.reads_clamp:
        raise ValueError(
            f"config.rollout.clamp: got {rollout.clamp} with sde={rollout.sde!r}, which does not "
            f"read it; allowed: 0, or sde={' or '.join(kinds.clamped_kinds())}"
        )


def _validate_updates(config: Config) -> None:
    loss = config.loss
    pieces = config.batch_size // loss.micro_batch
    if loss.split_updates and loss.updates_per_rollout == 1:
        raise ValueError(
            "config.loss.split_updates: got True with updates_per_rollout=1; allowed: at least 2 "
            "updates, or False"
        )
    if loss.split_updates and pieces % loss.updates_per_rollout:
        raise ValueError(
            f"config.loss.updates_per_rollout: got {loss.updates_per_rollout} with split_updates; "
            f"allowed: a divisor of the {pieces} micro-batches of a rollout (config.loss."
            f"micro_batch = {loss.micro_batch} of {config.batch_size} samples)"
        )
    if config.eval.weights == "ema" and not config.ema.decay:
        raise ValueError(
            "config.eval.weights: got 'ema' with config.ema.decay=0, where there is no average; "
            "allowed: trained, or a decay above 0"
        )


def _validate_forward(config: Config) -> None:
    """What has no meaning for a loss on clean samples, noised again."""
    region = config.trust_region
    previous = region.previous_estimator if region.penalises_motion else "closed_form"
    for path, value, allowed in (
        ("rollout.eta_match.kind", config.rollout.eta_match.kind, ""),
        ("rollout.window", config.rollout.window, "all"),
        ("loss.equalizer", config.loss.equalizer, False),
        ("loss.log_prob_reduction", config.loss.log_prob_reduction, "mean"),
        ("trust_region.kl_time_weight", region.kl_time_weight, "uniform"),
        ("trust_region.previous_estimator", previous, "closed_form"),
        ("debug.shadow", config.debug.shadow, False),
    ):
        if value != allowed:
            raise ValueError(
                f"config.{path}: got {value!r} with loss.objective=nft, which has no transitions; "
                f"allowed: {allowed!r}"
            )


def _validate_ratio(loss: LossConfig) -> None:
    highest = loss.clip_range / 10
    if loss.ratio_tolerance > highest * (1 + 1e-9):  # 1e-6 is more than 1e-5 / 10 by one bit
        raise ValueError(
            f"config.loss.ratio_tolerance: got {loss.ratio_tolerance:g}; allowed: at most a tenth "
            f"of config.loss.clip_range = {loss.clip_range:g}, that is {highest:g}"
        )


def require_stochastic(rollout: RolloutConfig, stochastic: np.ndarray) -> None:
    """Refuses a schedule without a step that injects noise; `stochastic` is bool [T].

    Raises:
      ValueError: with what could be changed.
    """
    if not stochastic.any():
        raise ValueError(
            f"config.rollout: num_steps={rollout.num_steps}, sde={rollout.sde!r}, "
            f"last_step={rollout.last_step!r} leaves no stochastic step to train; allowed: more "
            "steps, or last_step=stochastic"
        )


def validate_matched_eta(rollout: RolloutConfig, eta: float) -> None:
    """Checks the eta that `rollout.eta_match` asks for; it has the range of `rollout.eta`.

    Raises:
      ValueError: with the match, the eta that it needs and what is allowed.
    """
    if not 0 < eta <= sde.HIGHEST_ETA:
        match = rollout.eta_match
        raise ValueError(
            f"config.rollout.eta_match: kind={match.kind!r} with eta={match.eta} needs "
            f"rollout.eta = {eta:.4g} with sde={rollout.sde!r}; allowed: an eta of at most "
            f"{sde.HIGHEST_ETA:g}"
        )


def _validate_rewards(rewards: RewardsConfig) -> None:
    try:
        names.check(rewards.weights)
    except ValueError as error:
        raise ValueError(f"config.rewards.weights: got {error}") from error
    if not rewards.optimised:
        raise ValueError(
            f"config.rewards.weights: got {tuple(rewards.weights.values())} for "
            f"{', '.join(rewards.weights) or 'no reward'}; allowed: one of them not 0"
        )

    # Where the server is: ours, or one that runs already
    if bool(rewards.address) == rewards.spawn:
        raise ValueError(
            f"config.rewards: spawn={rewards.spawn} with address="
            f"{rewards.address!r}; allowed: spawn=True without an address, or "
            "spawn=False with the HOST:PORT of a running server"
        )
    if rewards.address and not _is_address(rewards.address):
        raise ValueError(
            f"config.rewards.address: got {rewards.address!r}; allowed: HOST:PORT, as in "
            "localhost:50051 or [::1]:50051, without http://"
        )
    if rewards.spawn and rewards.backend not in BACKENDS and ":" not in rewards.backend:
        raise ValueError(
            f"config.rewards.backend: got {rewards.backend!r}; allowed: {', '.join(BACKENDS)}, or "
            "package.module:Class"
        )

    if 0 < rewards.silence_seconds < 1:
        raise ValueError(
            f"config.rewards.silence_seconds: got {rewards.silence_seconds}; allowed: at least 1, "
            "or 0 for never"
        )


def _is_address(address: str) -> bool:
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    plain = bool(host) and not any(c.isspace() or c in "/:[]@" for c in host)
    return (bracketed or plain) and port.isascii() and port.isdigit() and 0 < int(port) < 65536
