"""Builds the validated dataclasses of a run from a ConfigDict."""

import dataclasses

import ml_collections

from sage_grpo_jax.common import fields
from sage_grpo_jax.config import checks as config_checks
from sage_grpo_jax.config.schema import Config
from sage_grpo_jax.flow import injected_noise, schedules, sde


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """The validated dataclasses of a ConfigDict.

    Raises:
      ValueError: unknown or missing field, wrong type, value out of range.
    """
    result = fields.build(Config, config.to_dict(), "config")
    config_checks.validate(result)
    # What follows from other fields is put in place here, once: a run sees one kind of config.
    region = result.trust_region.with_fixed_weight()
    return _with_matched_eta(dataclasses.replace(result, trust_region=region))


def _with_matched_eta(config: Config) -> Config:
    """Replaces eta by the one that `rollout.eta_match` asks for."""
    rollout, match = config.rollout, config.rollout.eta_match
    if not match.kind:
        return config

    # All of it is numpy: no backend of JAX may start before the devices are divided. Which steps a
    # kind can noise does not depend on η, as long as it is not 0.
    schedule = schedules.host_schedule(rollout.num_steps, rollout.shift)
    stochastic = sde.stochastic_steps(
        rollout.sde, schedule, 1.0, rollout.last_step, clamp=rollout.clamp
    )
    config_checks.require_stochastic(rollout, stochastic)

    try:
        eta = injected_noise.matched_eta(
            rollout.sde,
            schedule,
            match.kind,
            match.eta,
            last_step=rollout.last_step,
            window=rollout.window,
            window_size=rollout.window_size,
            motion=rollout.window_motion,
            clamp=rollout.clamp,
        )
    except ValueError as error:
        raise ValueError(f"config.rollout.eta_match: {error}") from error

    config_checks.validate_matched_eta(rollout, eta)
    return dataclasses.replace(config, rollout=dataclasses.replace(rollout, eta=eta))
