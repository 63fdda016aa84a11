"""Closed-form KL divergence of two Gaussian denoising steps."""

from __future__ import annotations

from typing import Any

import jax

from sage_grpo_jax.flow import sde


def gaussian_kl(
    mean: jax.Array, mean_ref: jax.Array, std: Any, *, reduction: str = "mean"
) -> jax.Array:
    """Returns KL(N(mean, std²) ‖ N(mean_ref, std²)) = (mean - mean_ref)²/(2·std²), f32[B].

    Averaged (or summed) over the elements of a sample. 0 with zero gradients where std = 0: a
    deterministic step is not constrained.

    Args:
      mean, mean_ref: [B, ...].
      std: scalar, [B] or [B, 1, ..., 1], the same for both.
      reduction: over the elements of a sample, `mean` or `sum`.
    """
    # With equal variances the terms of log std and trace cancel, and the distance of the means is
    # left.
    delta = sde.standardized_difference(mean, mean_ref, std)
    return sde.reduce_elements(0.5 * delta**2, reduction)
