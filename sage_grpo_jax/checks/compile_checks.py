"""Lowers the programs of a step from shapes alone: no weights, no devices of the target kind."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import schema
from sage_grpo_jax.models import registry
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.training import micro_losses, ratio
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.blueprint import Blueprint


def lower_programs(config: schema.Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """`jax.stages.Lowered` of rollout, decode and update.

    Call it outside `jax.set_mesh`: the devices of a topology description can't run anything, and
    the recipe's constants are worked out on the host first.

    Args:
      config: the recipe; only the networks' config.json files are read.
      mesh: of the target's devices, which may come from a topology description.
    """
    blueprint = Blueprint.describe(config, mesh)
    plan_lib.check_mesh(config, mesh)
    programs, state, networks = programs_lib.build(blueprint), blueprint.state, blueprint.networks
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    # The arguments are shapes with shardings, so that nothing is allocated.
    def shape(size: tuple[int, ...], dtype: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=place)

    def condition(batch: int, place: Any) -> Any:
        model = registry.of(networks.transformer)
        needs = model.embedding_needs(networks.transformer)
        length = config.data.max_text_tokens or needs.text_tokens
        text, mask = np.zeros((1, length, needs.text)), np.ones((1, length), bool)
        prompt = {"text": text, "text_mask": mask}
        frames = programs.plan.latent_shape[0]
        # One prompt of zeros, as long as a recipe's longest, tells names, shapes and types.
        one = model.make_condition(prompt, networks.transformer, frames)
        return jax.tree.map(lambda x: shape((batch, *x.shape[1:]), x.dtype, place), one)

    # One rollout as rollout and update see it
    batch = config.batch_size
    keys = shape((batch,), jax.random.key(0).dtype, rows)
    starts = shape((batch,), jnp.int32, rows)
    latent_shape = programs.plan.latent_shape

    # What does not change: VAE, negative prompt, base weights
    vae_params = jax.tree.map(
        lambda s: shape(s.shape, jnp.dtype(networks.vae.dtype), whole),
        networks_lib.abstract_params(networks.vae),
    )
    update_batch = update_lib.UpdateBatch(
        programs_lib.abstract_states(programs.plan, mesh),
        keys,
        condition(batch, rows),
        shape((batch,), jnp.float32, rows),
        shape((batch,), bool, rows),
        starts,
    )
    frozen = micro_losses.Frozen(condition(1, whole), blueprint.base)
    scalar = shape((), jnp.float32, whole)
    old = ratio.abstract_old_means(programs.plan, mesh)

    # The programs. Their arguments are made before the mesh is set, see above.
    arguments = {
        "rollout": (state.params, condition(batch, rows), frozen, keys, starts),
        "decode": (
            vae_params,
            shape((batch, *latent_shape), jnp.float32, rows),
            shape((), jnp.int32, whole),
        ),
        "update": (state, update_batch, frozen, ratio.Tolerances(scalar, scalar), old),
    }
    with jax.set_mesh(mesh):
        return {
            "rollout": programs.rollout.lower(*arguments["rollout"]),
            "decode": programs.decode.lower(
                *arguments["decode"], size=plan_lib.decode_batch(config, mesh)
            ),
            "update": programs.update.lower(*arguments["update"]),
        }
