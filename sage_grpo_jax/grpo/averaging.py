"""Moving averages of the parameters, as the last link of an optimizer chain.

An average is state that belongs to the update: it is checkpointed and sharded with the rest of the
optimizer, and an update that is skipped leaves it alone. Two uses, each with a state of its own:

  * `Ema`, the policy that is evaluated and exported (Flow-GRPO, Flow-CPS, DiffusionNFT);
  * `Sampling`, the policy that the rollouts of DiffusionNFT are drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

# (applied updates i32[]) -> the share of the old average that stays, f32[] in [0, 1]
Decay = Callable[[jax.Array], jax.Array]


class Ema(NamedTuple):
    """The average that is evaluated."""

    params: Any  # like the parameters, buffers of its own
    count: jax.Array  # i32[], applied updates


class Sampling(NamedTuple):
    """The average that is sampled."""

    params: Any
    count: jax.Array


State = TypeVar("State", Ema, Sampling)


def warmed_up(decay: float) -> Decay:
    """Returns min(decay, (1 + n)/(10 + n)): the first updates are forgotten sooner.

    Source: Flow-GRPO, flow_grpo/ema.py.
    """
    _check("decay", decay)
    return lambda count: jnp.minimum((1.0 + count) / (10.0 + count), decay)


def ramp(start: int, rate: float, highest: float) -> Decay:
    """Returns min(rate·(n - start), highest), 0 before `start` updates: at first the newest policy.

    Source: DiffusionNFT, scripts/train_nft_sd3.py, return_decay.
    """
    _check("highest", highest)
    return lambda count: jnp.minimum(rate * jnp.maximum(count - start, 0), highest)


def average(
    decay: Decay, every: int = 1, state: type[State] = Ema
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation; it leaves updates as they are.

    update(updates, state, params, *, renew=True): params are those before the update. Every
    `every`-th applied update, where `renew` holds, the average becomes decay·average +
    (1 - decay)·parameters after the update. Chain it last, so that it sees what is applied.

    Args:
        decay: see `warmed_up` and `ramp`; it gets the number of applied updates, this one included.
        every: applied updates from one step of the average to the next.
        state: Ema or Sampling.
    """
    if every < 1:
        raise ValueError(f"every={every!r}: must be at least 1")

    def init(params: Any) -> State:
        # Aliases would be donated twice with the parameters; jit keeps jnp.copy a real copy.
        return state(jax.tree.map(jnp.copy, params), jnp.zeros([], jnp.int32))

    def update(
        updates: Any, old: State, params: Any = None, *, renew: Any = True, **extra_args: Any
    ) -> tuple[Any, State]:
        del extra_args
        if params is None:
            raise ValueError("average: update needs the parameters")
        count = optax.safe_increment(old.count)
        due = (count % every == 0) & renew
        share = jnp.where(due, decay(count), 1.0)
        new = optax.apply_updates(params, updates)

        def mix(average: jax.Array, param: jax.Array) -> jax.Array:
            # In this form equal values stay equal bit for bit.
            return jnp.where(due, param + share.astype(param.dtype) * (average - param), average)

        return updates, state(jax.tree.map(mix, old.params, new), count)

    return optax.GradientTransformationExtraArgs(init, update)


def find(optimizer_state: Any, state: type[State]) -> State | None:
    """Returns the Ema or Sampling state within the state of a chain; None where there is none."""
    nodes = jax.tree.leaves(optimizer_state, is_leaf=lambda node: isinstance(node, state))
    found = [node for node in nodes if isinstance(node, state)]
    if len(found) > 1:
        raise ValueError(f"optimizer state: must hold one {state.__name__}, holds {len(found)}")
    return found[0] if found else None


def _check(name: str, decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"{name}={decay!r}: must be at least 0 and below 1")
