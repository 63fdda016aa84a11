"""What a run refuses before it does anything expensive; weights with NaN once they are loaded."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import schema
from sage_grpo_jax.models import attention
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.policy import starting_adapters
from sage_grpo_jax.training import checkpoint
from sage_grpo_jax.training.blueprint import Blueprint
from sage_grpo_jax.weights import store


def check(config: schema.Config) -> Blueprint:
    """The blueprint of a run, after all checks that need no weights and no prompts.

    Raises:
      ValueError: naming the field: networks, clip, mesh, attention or weights that do not fit.
    """
    blueprint = Blueprint.read(config, make_mesh(config))
    networks = blueprint.networks
    _ = blueprint.plan  # refuses clips and schedules
    plan_lib.check_mesh(config, blueprint.mesh)
    _check_attention(networks, blueprint.mesh)

    starting_adapters.check(config.lora, networks.transformer, blueprint.shapes)
    check_weights(networks)
    return blueprint


def make_mesh(
    config: schema.Config, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of a config.

    Args:
      config: the recipe.
      devices: of the mesh; None: all.

    Raises:
      ValueError: naming the field.
    """
    try:
        return mesh_lib.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    except ValueError as error:
        raise ValueError(f"config.{error}") from error


def _check_attention(networks: networks_lib.Networks, mesh: jax.sharding.Mesh) -> None:
    network = networks.transformer
    platform = mesh.devices.flat[0].platform
    head_size, dtype = network.attention_head_dim, jnp.dtype(network.dtype)
    try:
        attention.check(network.attention, platform, head_size, dtype)
    except ValueError as error:
        raise ValueError(f"config.model.{error}") from error


def open_prompts(
    config: schema.Config, workdir: pathlib.Path, networks: networks_lib.Networks
) -> prompts_lib.Prompts:
    """`policy.prompts.open_prompts` of a run.

    Raises:
      ValueError: see there.
      StorageError: embeddings in the workdir that could not be written or read.
    """
    try:
        return prompts_lib.open_prompts(config, workdir, networks)
    except RecursionError as error:  # a RuntimeError, but no trouble of a disk
        raise ValueError(
            f"config.data: values in a file are nested too deeply ({error})"
        ) from error
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise checkpoint.storage_error("the embeddings", workdir, error) from error


def check_weights(networks: networks_lib.Networks) -> None:
    """Reads the headers of both networks' weights, not their values.

    Raises:
      ValueError: naming the field, for files that cannot be read, and tensors that are missing,
        unexpected or misshapen.
    """
    for field, path, network in (
        ("transformer", networks.transformer_path, networks.transformer),
        ("vae", networks.vae_path, networks.vae),
    ):
        with loading(field):
            store.open_source(path, network)


@jax.jit
def _finite_leaves(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in leaves]


@contextlib.contextmanager
def loading(field: str) -> Iterator[None]:
    """Names the field of the network whose weights are read in the block.

    Raises:
      ValueError: instead of an OSError, or with the field in front.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if str(error).startswith("config."):
            raise
        raise ValueError(f"config.model.{field}: {error}") from error


def require_finite(params: Any) -> None:
    """Refuses parameters that hold NaN or infinity.

    Raises:
      ValueError: naming the parameters.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    # The leaves are looked at where they are: one program, and one flag of each to the host.
    good = jax.device_get(_finite_leaves([x for _, x in leaves]))
    bad = [
        "/".join(str(key.key) for key in path)
        for (path, _), ok in zip(leaves, good, strict=True)
        if not ok
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{', '.join(bad[:5])}{more} hold NaN or infinity; allowed: finite weights"
        )
