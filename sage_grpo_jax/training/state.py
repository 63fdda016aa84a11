"""What the optimizer steps on: parameters, optimizer state, and how both lie on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sage_grpo_jax.parallel import sharding


class LearnerState(NamedTuple):
    """The trained state; everything that a checkpoint must hold besides the data iterator."""

    params: Any  # all weights, or with LoRA the adapters
    opt_state: Any  # clip, AdamW, trust region (with anchor and previous parameters)
    step: jax.Array  # rollouts so far; int32 []


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
