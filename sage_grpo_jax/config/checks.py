"""Checks of a config: every field by itself, then those that depend on each other.

Every error names the field, the value and what is allowed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sage_grpo_jax.config import methods
from sage_grpo_jax.config.schema import Config, LossConfig, RewardsConfig, RolloutConfig
from sage_grpo_jax.flow import guidance, kinds, sde, windows
from sage_grpo_jax.grpo import advantage, equalizer, loss
from sage_grpo_jax.models import attention, frames, registry
from sage_grpo_jax.rewards import names
from sage_grpo_jax.rewards.backends import BACKENDS
from sage_grpo_jax.worlds.moving_shapes import spec

_CHOICES = {
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.matmul_precision": ("highest", "high", "default"),
    "model.attention": attention.IMPLEMENTATIONS,
    "model.vae_tiling": frames.TILINGS,
    "data.text_encoder": ("words", "cache"),
    "rollout.sde": sde.KINDS,
    "rollout.window": windows.WINDOWS,
    "rollout.trained_choice": windows.TRAINED_CHOICES,
    "rollout.guidance_mode": guidance.MODES,
    "rollout.last_step": sde.LAST_STEPS,
    "advantage.std": advantage.STDS,
    "advantage.combine": advantage.COMBINES,
    "loss.objective": (*loss.OBJECTIVES, "nft"),
    "loss.guidance_gradient": guidance.GRADIENTS,
    "loss.median": equalizer.MEDIANS,
    "loss.log_prob": sde.LOG_PROBS,
    "loss.log_prob_reduction": sde.REDUCTIONS,
    "loss.step_reduction": ("mean", "sum"),
    "loss.ratio_action": ("stop", "log"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "lora.base_dtype": ("auto", "float32", "bfloat16"),
    "eval.weights": ("trained", "ema"),
}
# field -> (lowest, highest); None: no bound.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    "num_steps": (1, None),
    "seed": (0, 2**32 - 1),
    "video.frames": (1, None),
    "video.height": (1, None),
    "video.width": (1, None),
    "data.max_text_tokens": (0, None),
    "rollout.eta": (0, sde.HIGHEST_ETA),
    "rollout.eta_match.eta": (0, sde.HIGHEST_ETA),
    "rollout.clamp": (0, sde.HIGHEST_CLAMP),
    "rollout.window_size": (0, 1000),
    "rollout.trained_fraction": (0, 1),
    "rollout.num_steps": (1, 1000),
    "rollout.shift": (0.1, 20),
    "rollout.guidance": (0, None),
    "rollout.prompts_per_step": (1, None),
    "rollout.group_size": (2, None),
    "rollout.decode_batch": (1, None),
    "rewards.max_in_flight": (1, None),
    "rewards.silence_seconds": (0, None),
    "rewards.min_valid_fraction": (0, 1),
    "rewards.max_skipped_updates": (1, None),
    "mesh.data": (-1, None),
    "mesh.fsdp": (-1, None),
    "mesh.context": (-1, None),
    "advantage.epsilon": (0, None),
    "advantage.std_floor": (0, None),
    "loss.updates_per_rollout": (1, None),
    "loss.micro_batch": (1, None),
    "loss.ratio_tolerance": (0, None),
    # Other noise alone is √2 away.
    "loss.rollout_tolerance": (0, 1),
    "nft.decay_start": (0, None),
    "nft.decay_rate": (0, None),
    "nft.decay_limit": (0, 1),
    "ema.decay": (0, 1),
    "ema.every": (1, None),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.warmup_steps": (0, None),
    "optimizer.final_fraction": (0, 1),
    "optimizer.momentum": (0, 1),
    "optimizer.newton_schulz_steps": (1, 20),
    "optimizer.weight_decay": (0, None),
    "lora.rank": (0, None),
    "lora.alpha": (0, None),
    "lora.learning_rate": (0, None),
    "eval.every": (0, None),
    "eval.num_prompts": (1, None),
    "eval.num_test_prompts": (0, None),
    "eval.samples_per_prompt": (1, None),
    "eval.num_steps": (1, 1000),
    "eval.seed": (0, 2**32 - 1),
    "eval.sheet_prompts": (0, None),
    "checkpoint.every": (1, None),
    "checkpoint.keep": (1, None),
}
_POSITIVE = (
    "video.fps",
    "rewards.timeout_seconds",
    "rewards.budget_seconds",
    "advantage.clip",
    "loss.clip_range",
    "rollout.trained_fraction",
    "nft.beta",
    "optimizer.learning_rate",
    "optimizer.grad_clip",
    "optimizer.eps",
)
_BELOW_ONE = (
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.momentum",
    "ema.decay",
    "nft.decay_limit",
)


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def validate(config: Config) -> None:
    """Checks every field by itself, then those that depend on each other.

    Raises:
      ValueError: with the field, its value and what is allowed.
    """
    for path, allowed in _CHOICES.items():
        if (value := _get(config, path)) not in allowed:
            raise ValueError(f"config.{path}: got {value!r}; allowed: {', '.join(allowed)}")
    for path, (low, high) in _RANGES.items():
        if path == "rollout.eta" and config.rollout.eta_match.kind:
            continue  # eta_match replaces it; see `matched_eta`
        value = _get(config, path)
        # Written so that NaN and infinity fail.
        if not (
            -math.inf < value < math.inf
            and (low is None or value >= low)
            and (high is None or value <= high)
        ):
            bounds = "finite" if low is None else f"at least {low}"
            bounds = bounds if high is None else f"{low} to {high}"
            raise ValueError(f"config.{path}: got {value}; allowed: {bounds}")
    for path in _POSITIVE:
        if not 0 < (value := _get(config, path)) < math.inf:
            raise ValueError(f"config.{path}: got {value}; allowed: greater than 0 and finite")
    _validate_together(config)


def _validate_together(config: Config) -> None:
    rollout = config.rollout
    if not config.name:
        raise ValueError("config.name: got ''; allowed: a name for the run")
    if config.method not in methods.METHODS:
        allowed = ", ".join(methods.METHODS)
        raise ValueError(f"config.method: got {config.method!r}; allowed: {allowed}")
    if not isinstance(config.method, methods.Applied):
        raise ValueError(methods.name_alone(config.method))
    if config.model.variant and config.model.variant not in registry.variants():
        raise ValueError(
            f"config.model.variant: got {config.model.variant!r}; allowed: a released one of "
            f"{', '.join(registry.variants())}; or ''"
        )
    try:
        _ = config.lora.adapters
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    if config.lora.init and not config.lora.rank:
        raise ValueError(
            f"config.lora.init: got {config.lora.init!r} with lora.rank=0; allowed: adapters for a "
            "run that trains adapters"
        )
    _validate_sampler(config)
    for path in _BELOW_ONE:
        if (value := _get(config, path)) == 1:
            raise ValueError(f"config.{path}: got {value}; allowed: below 1")
    _validate_ratio(config.loss)
    _validate_updates(config)
    if config.loss.objective == "nft":
        _validate_forward(config)
    if config.batch_size % config.loss.micro_batch:
        raise ValueError(
            f"config.loss.micro_batch: got {config.loss.micro_batch}; allowed: a divisor of "
            f"prompts_per_step × group_size = {config.batch_size}"
        )
    if config.batch_size % rollout.decode_batch:
        raise ValueError(
            f"config.rollout.decode_batch: got {rollout.decode_batch}; allowed: a divisor of "
            f"prompts_per_step × group_size = {config.batch_size}"
        )
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
    _validate_rewards(config.rewards)


def _validate_sampler(config: Config) -> None:
    rollout = config.rollout
    matched = bool(rollout.eta_match.kind)  # eta is not read
    kind, stochastic = sde.KINDS[rollout.sde], kinds.stochastic_kinds()
    if matched and rollout.eta_match.kind not in stochastic:
        raise ValueError(
            f"config.rollout.eta_match.kind: got {rollout.eta_match.kind!r}; allowed: "
            f"{', '.join(stochastic)}, or ''"
        )
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
    low, high = _RANGES["rollout.eta"]
    if not low < eta <= high:
        match = rollout.eta_match
        raise ValueError(
            f"config.rollout.eta_match: kind={match.kind!r} with eta={match.eta} needs "
            f"rollout.eta = {eta:.4g} with sde={rollout.sde!r}; allowed: an eta of at most {high:g}"
        )


def _validate_rewards(rewards: RewardsConfig) -> None:
    try:
        names.check(rewards.weights)
    except ValueError as error:
        raise ValueError(f"config.rewards.weights: got {error}") from error
    for name, weight in rewards.weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"config.rewards.weights.{name}: got {weight}; allowed: finite")
    if not rewards.optimised:
        raise ValueError(
            f"config.rewards.weights: got {tuple(rewards.weights.values())} for "
            f"{', '.join(rewards.weights) or 'no reward'}; allowed: one of them not 0"
        )
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
