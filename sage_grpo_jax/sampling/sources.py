"""Where the sampled policy comes from: converted weights, adapters, or a run's checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp

from sage_grpo_jax import weights
from sage_grpo_jax.config import schema
from sage_grpo_jax.models import lora as lora_lib
from sage_grpo_jax.parallel import hosts, sharding
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.policy.policy import Policy
from sage_grpo_jax.training import checkpoint as checkpoint_lib
from sage_grpo_jax.training import input_checks
from sage_grpo_jax.training.blueprint import Blueprint
from sage_grpo_jax.weights import adapters as adapters_lib


@dataclasses.dataclass(frozen=True)
class Source:
    """Which policy. All None: the weights that the recipe names.

    Attributes:
      weights: folder of a transformer, in place of `config.model.transformer`.
      checkpoint: workdir of a run; its newest checkpoint.
      adapters: folder of LoRA adapters for the weights.
      ema: of the run, the moving average of its parameters.
    """

    weights: str | None = None
    checkpoint: str | None = None
    adapters: str | None = None
    ema: bool = False


def adapt_config(config: schema.Config, source: Source) -> schema.Config:
    """The recipe with the source's transformer, and with the adapters that its run has.

    A run says in its workdir what its checkpoints hold (`lora.json`, with adapters), so that
    neither rank nor targets have to be given again.

    Raises:
      ValueError: sources that exclude each other, a folder that is no run, adapters of a run on
        other weights.
    """
    # Sources that exclude each other.
    if source.checkpoint and source.adapters:
        raise ValueError(
            f"--checkpoint={source.checkpoint} and --adapters={source.adapters}: both given; "
            "allowed: one of them (a run with adapters keeps them in its checkpoints)"
        )
    if source.ema and not source.checkpoint:
        raise ValueError("--ema: without --checkpoint there is no average; allowed: both")

    # Without a run: the weights as they are, or with adapters from a folder.
    if source.weights:
        config = _replace(config, "model", transformer=source.weights)
    if source.checkpoint is None:
        return _replace(config, "lora", rank=0)

    # A run: all parameters, or adapters beside weights that are not in its checkpoints.
    workdir = pathlib.Path(source.checkpoint)
    if not (workdir / checkpoint_lib.FOLDER).is_dir():
        raise ValueError(
            f"--checkpoint: {workdir} has no folder {checkpoint_lib.FOLDER}; allowed: the workdir "
            "of a run"
        )
    file = workdir / "lora.json"
    if not file.exists():
        return _replace(config, "lora", rank=0)
    lora, base = adapters_lib.read_lora_json(file)
    if base is None:
        raise ValueError(f"{file}: base is missing: must be the folder of the run's weights")

    # On other weights adapters would be noise, and nothing would fail.
    if not source.weights and not _same_folder(base, config.model.transformer):
        raise ValueError(
            f"--checkpoint: the adapters of {workdir} were trained on {base}, the recipe "
            f"has {config.model.transformer}; allowed: that recipe, or --weights=FOLDER with the "
            "same weights"
        )
    targets = ",".join(lora.targets)
    return _replace(config, "lora", rank=lora.rank, alpha=lora.alpha, targets=targets)


def load(blueprint: Blueprint, source: Source) -> Policy:
    """The policy on the mesh; weights without a checkpoint come in the compute dtype.

    Args:
      blueprint: its config is that of `adapt_config`.
      source: the same as for `adapt_config`.

    Raises:
      ValueError, FileNotFoundError: files that are missing or do not fit.
    """
    # A run may have diverged: better said than seen in the clips.
    if source.checkpoint is not None:
        params, adapters = blueprint.load_policy(source.checkpoint, source.ema)
        try:
            input_checks.require_finite(params if adapters is None else adapters)
        except ValueError as error:
            raise ValueError(f"--checkpoint: {source.checkpoint}: {error}") from error
        scale = 1.0 if adapters is None else blueprint.config.lora.adapters.scale
        return Policy(params, adapters, scale)

    params = blueprint.load_transformer(jnp.dtype(blueprint.networks.transformer.dtype))
    if source.adapters is None:
        return Policy(params)
    adapters, lora = _load_adapters(blueprint, source.adapters)
    return Policy(params, adapters, lora.scale)


def _load_adapters(blueprint: Blueprint, path: str) -> tuple[Any, lora_lib.LoraConfig]:
    # A few hundred megabytes at most: every device has all of them.
    adapters, lora = weights.load_adapters(path, blueprint.networks.transformer)
    return hosts.to_global(adapters, sharding.replicated(blueprint.mesh)), lora


def describe(networks: networks_lib.Networks, source: Source) -> dict[str, Any]:
    """What goes into the record of a sample, so that videos of other weights are told apart."""
    found: dict[str, Any] = {
        "transformer": str(networks.transformer_path.absolute()),
        "vae": str(networks.vae_path.absolute()),
        "dtype": networks.transformer.dtype,
    }
    if source.checkpoint is not None:
        folder = pathlib.Path(source.checkpoint).absolute()
        steps = [p.name for p in (folder / checkpoint_lib.FOLDER).iterdir() if p.name.isdigit()]
        found |= {"checkpoint": str(folder), "step": max(map(int, steps), default=None)}
        found |= {"ema": True} if source.ema else {}
    if source.adapters is not None:
        found["adapters"] = str(pathlib.Path(source.adapters).absolute())
    return found


def _same_folder(first: str, second: str) -> bool:
    paths = (networks_lib.resolve_path(first), networks_lib.resolve_path(second))
    return paths[0].resolve() == paths[1].resolve()


def _replace(config: schema.Config, group: str, **values: Any) -> schema.Config:
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **values)}
    )
