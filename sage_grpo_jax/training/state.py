"""What the optimizer steps on: parameters, optimizer state, and how both lie on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sage_grpo_jax.grpo import trust_region
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import config as config_lib


class LearnerState(NamedTuple):
    """The trained state; everything that a checkpoint must hold besides the data iterator."""

    params: Any  # all weights, or with LoRA the adapters
    opt_state: Any  # clip, AdamW, trust region (with anchor and previous parameters)
    step: jax.Array  # rollouts so far; int32 []


def make_optimizer(config: config_lib.Config) -> optax.GradientTransformationExtraArgs:
    """Global-norm clip, AdamW with linear warm-up, trust region last (it sees the final update)."""
    optimizer = config.optimizer
    learning_rate = optax.schedules.warmup_constant_schedule(
        init_value=config.learning_rate / (optimizer.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=optimizer.warmup_steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(optimizer.grad_clip),
        optax.adamw(
            learning_rate,
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        ),
        trust_region.trust_region(config.trust_region),
    )


def init_state(tx: optax.GradientTransformation, params: Any) -> LearnerState:
    """A fresh state around `params`; the trust region copies them."""
    return LearnerState(params, tx.init(params), jnp.zeros((), jnp.int32))


def abstract_state(
    tx: optax.GradientTransformation,
    abstract_params: Any,
    names: Any,
    mesh: jax.sharding.Mesh,
) -> LearnerState:
    """`LearnerState` of ShapeDtypeStructs with shardings, without allocating anything.

    Args:
      tx: the optimizer.
      abstract_params: ShapeDtypeStructs of the parameters.
      names: logical axis names of the parameters.
      mesh: the device mesh.
    """
    params = sharding.parameter_shardings(mesh, names, abstract_params)
    shardings = LearnerState(
        params,
        sharding.optimizer_shardings(tx, mesh, abstract_params, params),
        sharding.replicated(mesh),
    )
    shapes = jax.eval_shape(lambda p: init_state(tx, p), abstract_params)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings in a tree of ShapeDtypeStructs or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
