"""The policy: a transformer's parameters and adapters, and the one velocity that it has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from sage_grpo_jax.flow import guidance as guidance_lib
from sage_grpo_jax.flow import schedules
from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import TransformerConfig

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "adapters"), meta_fields=("scale",)
)
@dataclasses.dataclass(frozen=True)
class Policy:
    """What gives the velocity; a pytree.

    Attributes:
      params: of the transformer.
      adapters: its LoRA adapters, or None.
      scale: of the adapters; static.
    """

    params: Any
    adapters: Any = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, and the numerics of the network under it.

    Attributes:
      scale: 1 runs the model once a step.
      mode: both branches in one batch, or one after the other; see `flow.guidance.guided`.
      precision: of float32 matmuls: highest, high or default.
    """

    scale: float = 1.0
    mode: str = "batch"
    precision: str = "highest"


def guided_velocity(
    policy: Policy,
    transformer: TransformerConfig,
    condition: Any,
    negative: Any,
    schedule: schedules.Schedule,
    guidance: Guidance,
    gradient: str = "both",
) -> Velocity:
    """(latents [B, t, h, w, C], timestep [B]) -> velocity of the policy, with guidance; float32.

    Args:
      policy: parameters and adapters.
      transformer: config of the transformer.
      condition: of B samples, from its `make_condition`.
      negative: of the one unconditional prompt, leaves [1, ...]; None: there is no guidance.
      schedule: of the sampler, for models that are told where their step ends.
      guidance: see there.
      gradient: of which branches of guidance, see `flow.guidance.guided`.
    """
    model = registry.of(transformer)
    # It is the same at every step, so it is made outside of the loop over them.
    unconditional = None if negative is None else model.unconditional(condition, negative)

    def velocity(latents: jax.Array, timestep: jax.Array, branch: Any) -> jax.Array:
        # It is a function, so that nothing is traced for models that do not ask where a step ends.
        end = functools.partial(schedules.next_timestep, schedule, timestep)
        branch = model.with_step_end(branch, end, transformer)
        # TPUs would round products of float32 numbers to bfloat16. What is bfloat16 already stays
        # so.
        with jax.default_matmul_precision(guidance.precision):
            return model.velocity(
                policy.params,
                latents,
                timestep,
                branch,
                transformer,
                policy.adapters,
                policy.scale,
            )

    guided = guidance_lib.guided(velocity, guidance.scale, mode=guidance.mode, gradient=gradient)
    return lambda latents, timestep: guided(latents, timestep, condition, unconditional)
