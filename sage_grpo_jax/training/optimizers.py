"""The optimizer of a recipe: clip, AdamW or Muon, trust region."""

from typing import Any

import optax
from flax import traverse_util

from sage_grpo_jax.config import schema
from sage_grpo_jax.grpo import trust_region

# The scale of the official code's Muon: 0.2 · sqrt(max(in, out)), which makes the root mean square
# of an update that of AdamW.
_CONSISTENT_RMS = 0.2


def make_optimizer(config: schema.Config) -> optax.GradientTransformationExtraArgs:
    """Global-norm clip, AdamW or Muon, trust region last (it sees the final update)."""
    return optax.chain(
        optax.clip_by_global_norm(config.optimizer.grad_clip),
        _muon(config) if config.optimizer.name == "muon" else _adamw(config),
        trust_region.trust_region(config.trust_region),
    )


def learning_rate(config: schema.Config) -> optax.Schedule:
    """The learning rate over applied updates: linear warm-up, then as `optimizer.schedule` says."""
    # Schedules count applied updates: a skipped one keeps the old state of the optimizer, its count
    # included. What is left after the warm-up is the length of the decay.
    optimizer, peak = config.optimizer, config.learning_rate
    total = config.num_steps * config.loss.updates_per_rollout
    rest = max(total - optimizer.warmup_steps, 1)

    if optimizer.schedule == "cosine":
        after = optax.schedules.cosine_decay_schedule(peak, rest, optimizer.final_fraction)
    elif optimizer.schedule == "linear":
        after = optax.schedules.linear_schedule(peak, peak * optimizer.final_fraction, rest)
    else:
        after = optax.schedules.constant_schedule(peak)

    if optimizer.warmup_steps == 0:
        return after
    # The first update already has a part of the rate: 1/(n+1), 2/(n+1), ... 1.
    start = peak / (optimizer.warmup_steps + 1)
    warmup = optax.schedules.linear_schedule(start, peak, optimizer.warmup_steps)
    return optax.schedules.join_schedules([warmup, after], [optimizer.warmup_steps])


def _adamw(config: schema.Config) -> optax.GradientTransformation:
    optimizer = config.optimizer
    return optax.adamw(
        learning_rate(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )


def _muon(config: schema.Config) -> optax.GradientTransformation:
    optimizer = config.optimizer
    return optax.contrib.muon(
        learning_rate(config),
        ns_steps=optimizer.newton_schulz_steps,
        beta=optimizer.momentum,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        adam_weight_decay=optimizer.weight_decay,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=_CONSISTENT_RMS,
    )


def muon_dimensions(params: Any, *, kernels_only: bool = False) -> Any:
    """Which axes of each parameter are a matrix: a tree of MuonDimensionNumbers, None for AdamW.

    Parameters of stacked blocks have a leading layer axis, and each layer is a matrix of its own.
    Patch kernels [t, h, w, in, out] are one matrix [t·h·w·in, out]. Vectors (biases, norm scales)
    go to AdamW, stacked or not.

    Args:
      params: nested dicts of arrays.
      kernels_only: matrices that are no kernels, as embedding tables, go to AdamW too.
    """

    def dimensions(path: tuple[str, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if isinstance(leaf, optax.MaskedNode):  # Muon asks again about the tree without vectors
            return None
        # Axis 0 of stacked blocks is the layer, which is no axis of a matrix.
        rank, first = len(leaf.shape), int("blocks" in path)
        if rank - first < 2 or (kernels_only and path[-1] != "kernel"):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, rank - 1)), (rank - 1,))

    flat = traverse_util.flatten_dict(params, is_leaf=lambda _, x: not isinstance(x, dict))
    return traverse_util.unflatten_dict({k: dimensions(k, v) for k, v in flat.items()})


def warn_about_epsilon(rms_over_eps: float, eps: float) -> str | None:
    """What to tell a user whose gradients sink below Adam's eps; None where all is well.

    Losses that average over the elements of a video have tiny gradients (a 480p clip has 576,576
    latent elements): once their root mean square is near eps, updates lose their scale-free size.
    """
    if not 0 < rms_over_eps < 10:
        return None
    return (
        f"the root mean square of the gradient is {rms_over_eps:.2g} times config.optimizer.eps = "
        f"{eps:g}: Adam's updates shrink with it. Allowed: a smaller eps, or "
        "loss.log_prob_reduction=sum"
    )
