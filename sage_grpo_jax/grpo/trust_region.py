"""The dual trust region: reference parameters and the weight of the KL penalty.

The loss that goes with it is loss_policy + weight·kl, kl = Σ beta·KL(π ‖ π_reference) over
`references`. This module is the part with memory, an optax transformation to be chained last:

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5), trust_region(config))

so that it sees the update that is really applied. It leaves updates as they are, and keeps

  * anchor: the initial parameters (fixed kinds), or those of every N-th update (moving kinds);
  * previous: the parameters before the last update, so that the penalty damps the motion;
  * the weight, warmed up linearly (SAGE-GRPO Eq. 41), then steered by the mean of the last KLs.

Call it once per applied update, with the KL of the whole batch on all devices. An update that is
skipped must keep the old optimizer state as a whole: counts count applied updates.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sage_grpo_jax.common import fields

KINDS = ("none", "fixed", "stepwise", "moving", "dual", "fixed_stepwise")
FEEDBACKS = ("tighten", "paper", "none")
ESTIMATORS = ("closed_form", "log_ratio")
TIME_WEIGHTS = ("uniform", "equalized", "step_length")
REFERENCE_DTYPES = ("float32", "bfloat16")

_FIXED_KINDS = ("fixed", "fixed_stepwise")
_MOVING_KINDS = ("moving", "dual")
_PREVIOUS_KINDS = ("stepwise", "dual", "fixed_stepwise")


@dataclasses.dataclass(frozen=True)
class TrustRegionConfig:
    """Settings of `trust_region`. The defaults are calibrated, docs/methods.md.

    Attributes:
      kind: none; fixed (anchor = initial parameters); stepwise (previous parameters); moving
        (anchor renewed every `anchor_every` updates); dual (moving + stepwise);
        fixed_stepwise.
      anchor_every: N, in applied updates.
      anchor_weight, previous_weight: beta of each reference within the KL.
      fixed_weight: the weight that `with_fixed_weight` gives the kinds with a fixed anchor.
      initial_weight, final_weight, warmup_steps: linear warm-up of the weight, in updates (a
        fraction of one is possible).
      min_weight, max_weight: the range that feedback keeps the weight in.
      target_shift: d, the shift of the means that feedback aims at, in standard deviations of
        the transition (root mean square over elements): a KL of D = d²/2.
      feedback: after the warm-up. `tighten`: high KL raises the weight; `paper`: lowers it, as
        Eq. 42 is printed and the official code does; `none`: the weight stays.
      history: H, feedback acts on the mean of the last H KLs.
      high, low: feedback acts above high·D and below low·D ...
      up, down: ... and multiplies the weight by up or down.
      previous_estimator: of KL(π ‖ π_previous). `closed_form`, against the parameters before the
        last update: one more forward pass; `log_ratio`: the mean of log π_old - log π over the
        rollout's samples (Eq. 15 and the official code), which needs no parameters and has a
        gradient of mean zero with one update per rollout.
      kl_time_weight: of each step in the KLs of the references. `uniform`: the mean over
        the steps, which the last steps dominate (KL_t = N_t²·Δv²/2 for a change Δv of the
        velocity); `equalized`: times S_t², so that the same change of velocity costs the same
        at every step, as much as at the median step; `step_length`: times σ - σ', which turns
        the std of an Euler-Maruyama step in the denominator into the diffusion coefficient
        (Flow-GRPO).
      reference_dtype: `float32`, or `bfloat16` for references of half the size. Meant for a network
        that computes in bfloat16, which rounds them anyway where it uses them; elsewhere the KL to
        a rounded reference is not zero where the policy has not moved.
      step_bound: an update is scaled down so that KL(π_new ‖ π) is expected to stay below this,
        from the measured KL of the last update and the lengths of both; 0: no bound.
    """

    kind: str = fields.choice("dual", KINDS)
    anchor_every: int = fields.bounded(10, least=1)
    anchor_weight: float = fields.bounded(1.0, least=0)
    previous_weight: float = fields.bounded(0.1, least=0)
    fixed_weight: float = fields.bounded(0.04, least=0)
    initial_weight: float = fields.bounded(0.01, least=0)
    final_weight: float = fields.bounded(0.1, least=0)
    warmup_steps: float = fields.bounded(20.0, least=0)
    min_weight: float = fields.bounded(1e-3, least=0)
    max_weight: float = fields.bounded(30.0)
    target_shift: float = fields.bounded(0.02, above=0)
    feedback: str = fields.choice("tighten", FEEDBACKS)
    history: int = fields.bounded(10, least=1)
    high: float = fields.bounded(1.5)
    low: float = fields.bounded(0.5, least=0)
    up: float = fields.bounded(1.1, least=1)
    down: float = fields.bounded(0.9, above=0, most=1)
    previous_estimator: str = fields.choice("closed_form", ESTIMATORS)
    kl_time_weight: str = fields.choice("uniform", TIME_WEIGHTS)
    reference_dtype: str = fields.choice("float32", REFERENCE_DTYPES)
    step_bound: float = fields.bounded(0.0, least=0)

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is out of range."""
        fields.check(self)
        if self.step_bound > 0:
            fields.require(
                self.has_previous,
                self,
                "step_bound",
                "0 without the previous policy in closed form (kind stepwise, dual or "
                "fixed_stepwise, previous_estimator closed_form)",
            )
        fields.require(self.high > self.low, self, "high", f"greater than low={self.low}")
        ordered = self.max_weight >= self.min_weight
        fields.require(ordered, self, "max_weight", f"at least min_weight={self.min_weight}")
        if self.feedback != "none":
            allowed = f"min_weight to max_weight, {self.min_weight} to {self.max_weight}"
            inside = self.min_weight <= self.final_weight <= self.max_weight
            fields.require(inside, self, "final_weight", allowed)

    def with_fixed_weight(self) -> TrustRegionConfig:
        """Returns the settings in which a fixed anchor has the weight `fixed_weight` all along.

        The distance to the initial parameters is what is learned: feedback that aims at a value of
        it would forbid to learn more. Kinds without a fixed anchor stay as they are.
        """
        if self.kind not in _FIXED_KINDS:
            return self
        weight = self.fixed_weight
        return dataclasses.replace(
            self, initial_weight=weight, final_weight=weight, warmup_steps=0.0, feedback="none"
        )

    @property
    def target(self) -> float:
        """D, the KL (mean over elements) that feedback aims at."""
        return self.target_shift**2 / 2

    @property
    def has_anchor(self) -> bool:
        """Whether the loss needs KL(π ‖ π_anchor)."""
        return self.kind in _FIXED_KINDS + _MOVING_KINDS

    @property
    def penalises_motion(self) -> bool:
        """Whether the loss has a term for the previous policy, by whichever estimator."""
        return self.kind in _PREVIOUS_KINDS

    @property
    def has_previous(self) -> bool:
        """Whether the loss needs KL(π ‖ π_previous) in closed form, and so the parameters."""
        return self.penalises_motion and self.previous_estimator == "closed_form"


class TrustRegionState(NamedTuple):
    """State of `trust_region`; anchor and previous are trees of their own buffers, or None."""

    anchor: Any  # like the parameters
    previous: Any  # like the parameters, those before the last applied update
    weight: jax.Array  # f32[], λ of the next loss
    history: jax.Array  # f32[H], ring buffer of KLs, the latest at (count - 1) mod H
    count: jax.Array  # i32[], applied updates
    squared_norm: jax.Array  # f32[], of the last applied update


class Reference(NamedTuple):
    """One term beta·KL(π ‖ π_params) of the penalty."""

    name: str
    params: Any
    beta: float


def trust_region(config: TrustRegionConfig) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation; its update takes `kl`, the β-weighted sum that is in the loss.

    update(updates, state, params, *, kl, kl_previous=None): params are those before the update,
    θ_k, at which kl was measured. Afterwards previous = θ_k, and every N-th update a moving anchor
    becomes θ_k+1. With kind `none` kl may be left out; kl_previous, KL(π_k ‖ π_k-1) without its β,
    is needed for `step_bound` only. Updates change only where they exceed that bound.
    """

    def init(params: Any) -> TrustRegionState:
        return TrustRegionState(
            anchor=_copy(params, config) if config.has_anchor else None,
            previous=_copy(params, config) if config.has_previous else None,
            weight=_warmup_weight(config, jnp.zeros([], jnp.int32)),
            history=jnp.zeros([config.history], jnp.float32),
            count=jnp.zeros([], jnp.int32),
            squared_norm=jnp.zeros([], jnp.float32),
        )

    def update(
        updates: Any,
        state: TrustRegionState,
        params: Any = None,
        *,
        kl: Any = None,
        kl_previous: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, TrustRegionState]:
        del extra_args
        if params is None:
            raise ValueError("trust_region: update needs the parameters")
        if kl is None:
            if config.kind != "none":
                raise ValueError(f"trust_region: update needs kl for kind={config.kind!r}")
            kl = 0.0

        # What is measured now, with this update counted
        updates, squared_norm = _bounded(config, updates, state.squared_norm, kl_previous)
        history = state.history.at[state.count % config.history].set(kl)
        count = optax.safe_increment(state.count)

        # What the next loss is taken to. The updates are not applied yet: θ_k is what `params`
        # holds, and becomes the previous policy; θ_k+1 is what a new anchor must be.
        return updates, TrustRegionState(
            anchor=_next_anchor(config, state.anchor, params, updates, count),
            previous=_copy(params, config) if config.has_previous else None,
            weight=_next_weight(config, state.weight, history, count),
            history=history,
            count=count,
            squared_norm=squared_norm,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def references(state: TrustRegionState, config: TrustRegionConfig) -> list[Reference]:
    """Returns the references of the KL penalty; each costs one more forward per trained step."""
    terms = []
    if config.has_anchor:
        terms.append(Reference("anchor", state.anchor, config.anchor_weight))
    if config.has_previous:
        terms.append(Reference("previous", state.previous, config.previous_weight))
    return terms


def find_state(optimizer_state: Any) -> TrustRegionState:
    """Returns the TrustRegionState within the state of a chain.

    Raises:
      ValueError: there is none, or more than one.
    """

    def is_trust_region(node: Any) -> bool:
        return isinstance(node, TrustRegionState)

    nodes = jax.tree.leaves(optimizer_state, is_leaf=is_trust_region)
    found = [node for node in nodes if is_trust_region(node)]
    if len(found) != 1:
        raise ValueError(f"optimizer state: must hold one TrustRegionState, holds {len(found)}")
    return found[0]


def _bounded(
    config: TrustRegionConfig, updates: Any, last_squared_norm: jax.Array, kl_previous: Any
) -> tuple[Any, jax.Array]:
    """Returns the update, scaled down to `step_bound`, and its squared length.

    KL is quadratic in a small step: the last step of squared length n moved the policy by
    kl_previous, so this one is expected to move it by kl_previous·‖u‖²/n.
    """
    squared_norm = optax.tree.norm(updates, squared=True).astype(jnp.float32)
    if config.step_bound == 0:
        return updates, squared_norm
    if kl_previous is None:
        raise ValueError("trust_region: update needs kl_previous for step_bound")

    # Before the first update there is no last step, and a KL of 0 says nothing of the next one. The
    # numbers in the wheres keep the branch that is not taken finite.
    known = (last_squared_norm > 0) & (kl_previous > 0)
    expected = kl_previous * squared_norm / jnp.where(known, last_squared_norm, 1.0)
    exceeds = known & (expected > config.step_bound)
    scale = jnp.where(exceeds, jnp.sqrt(config.step_bound / jnp.where(exceeds, expected, 1.0)), 1.0)

    updates = jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates)
    return updates, squared_norm * scale**2


def _next_anchor(
    config: TrustRegionConfig, anchor: Any, params: Any, updates: Any, count: jax.Array
) -> Any:
    if config.kind not in _MOVING_KINDS:
        return anchor
    # Whether it is time depends on a count that only the device knows, hence a select.
    refresh = count % config.anchor_every == 0
    new_params = optax.apply_updates(params, updates)

    def leaf(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(refresh, _rounded(new, config), old)

    return jax.tree.map(leaf, new_params, anchor)


def _next_weight(
    config: TrustRegionConfig, weight: jax.Array, history: jax.Array, count: jax.Array
) -> jax.Array:
    if config.kind == "none" or config.feedback == "none":
        return _warmup_weight(config, count)
    # The history starts as zeros: the sum over it is the sum over its filled part.
    mean_kl = history.sum() / jnp.minimum(count, config.history)

    # Eq. 42. As printed a high KL lowers the weight; a trust region needs the other direction.
    if_high, if_low = config.up, config.down
    if config.feedback == "paper":
        if_high, if_low = if_low, if_high
    factor = jnp.where(mean_kl < config.low * config.target, if_low, 1.0)
    factor = jnp.where(mean_kl > config.high * config.target, if_high, factor)

    # Eq. 41 until the warm-up is over
    steered = jnp.clip(weight * factor, config.min_weight, config.max_weight)
    return jnp.where(count > config.warmup_steps, steered, _warmup_weight(config, count))


def _warmup_weight(config: TrustRegionConfig, count: jax.Array) -> jax.Array:
    if config.kind == "none":
        return jnp.zeros([], jnp.float32)
    # Eq. 41: a straight line, then its end
    progress = 1.0 if config.warmup_steps == 0 else jnp.minimum(count / config.warmup_steps, 1.0)
    change = config.final_weight - config.initial_weight
    return jnp.asarray(config.initial_weight + change * progress, jnp.float32)


def _copy(params: Any, config: TrustRegionConfig) -> Any:
    # Aliases would be donated twice with parameters and state; jit keeps jnp.copy a real copy.
    return jax.tree.map(lambda leaf: jnp.copy(_rounded(leaf, config)), params)


def _rounded(leaf: jax.Array, config: TrustRegionConfig) -> jax.Array:
    """A parameter as a reference keeps it; one that is smaller than that anyway stays as it is."""
    narrow = config.reference_dtype == "bfloat16" and leaf.dtype == jnp.float32
    return leaf.astype(jnp.bfloat16) if narrow else leaf
