"""Builds the validated dataclasses of a run from a ConfigDict."""

import dataclasses
import types
import typing
from typing import Any

import ml_collections

from sage_grpo_jax.common.frozen_dict import FrozenDict
from sage_grpo_jax.config import checks as config_checks
from sage_grpo_jax.config.schema import Config
from sage_grpo_jax.flow import injected_noise, schedules, sde


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """The validated dataclasses of a ConfigDict.

    Raises:
      ValueError: unknown or missing field, wrong type, value out of range.
    """
    result = _build(Config, config.to_dict(), "config")
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


def _build(cls: type, values: Any, path: str) -> Any:
    """The dataclass `cls` from a nested dict, with the types of its annotations checked."""
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {values!r}; allowed: a group of fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{path}.{unknown[0]}: unknown field; allowed: {', '.join(fields)}")
    if missing := sorted(set(fields) - set(values)):
        raise ValueError(f"{path}.{missing[0]}: missing")
    hints = typing.get_type_hints(cls)
    converted = {
        n: _convert(hints[n], values[n], f"{path}.{n}", f.default) for n, f in fields.items()
    }
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    """`value` as the annotated type, or an error; only int -> float is converted."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is FrozenDict:
        return _convert_mapping(typing.get_args(hint)[1], value, default, path)
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{path}: got {value}; allowed: finite numbers") from None
    # bool is an int in Python; a flag in place of a number is a mistake.
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(
            f"{path}: got {value!r} ({type(value).__name__}); allowed: {hint.__name__}"
        )
    return value


def _convert_mapping(hint: Any, value: Any, default: Any, path: str) -> FrozenDict[str, Any]:
    """A mapping with any names: those of the default first and in its order, then by name."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {value!r}; allowed: values by name")
    # A ConfigDict keeps no order, and the last digit of a sum depends on it.
    order = [*(n for n in default if n in value), *sorted(set(value) - set(default))]
    return FrozenDict((n, _convert(hint, value[n], f"{path}.{n}")) for n in order)
