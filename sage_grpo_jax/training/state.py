"""What the optimizer steps on: parameters, optimizer state, and how both lie on the mesh."""

from collections.abc import Collection
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
    # Moving averages, trees like `params` with buffers of their own; None where there is none.
    ema: Any = None  # evaluated and exported on request
    sampling: Any = None  # the rollouts are drawn from it; None: from `params`

    @property
    def sampled(self) -> Any:
        """The parameters that rollouts are drawn from."""
        return self.params if self.sampling is None else self.sampling


AVERAGES = ("ema", "sampling")


def init_state(
    tx: optax.GradientTransformation, params: Any, averages: Collection[str] = ()
) -> LearnerState:
    """A fresh state around `params`; trust region and averages copy them.

    Args:
      tx: the optimizer.
      params: the trained parameters.
      averages: which of `AVERAGES` the state has.
    """
    # Aliases would be donated twice; jit keeps jnp.copy a real copy.
    copies = {name: jax.tree.map(jnp.copy, params) for name in averages}
    return LearnerState(params, tx.init(params), jnp.zeros((), jnp.int32), **copies)


def abstract_state(
    tx: optax.GradientTransformation,
    abstract_params: Any,
    names: Any,
    mesh: jax.sharding.Mesh,
    averages: Collection[str] = (),
) -> LearnerState:
    """`LearnerState` of ShapeDtypeStructs with shardings, without allocating anything.

    Args:
      tx: the optimizer.
      abstract_params: ShapeDtypeStructs of the parameters.
      names: logical axis names of the parameters.
      mesh: the device mesh.
      averages: see `init_state`.
    """
    # Averages lie as the parameters do, and so does what mirrors them in the optimizer's state.
    params = sharding.parameter_shardings(mesh, names, abstract_params)
    shardings = LearnerState(
        params,
        sharding.optimizer_shardings(tx, mesh, abstract_params, params),
        sharding.replicated(mesh),
        **dict.fromkeys(averages, params),
    )

    shapes = jax.eval_shape(lambda p: init_state(tx, p, averages), abstract_params)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings in a tree of ShapeDtypeStructs or arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
