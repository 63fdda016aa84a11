"""The adapters that a run trains: checked against the model, fresh or from a file (`lora.init`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from sage_grpo_jax import weights
from sage_grpo_jax.config import schema
from sage_grpo_jax.models import lora, registry
from sage_grpo_jax.models.door import TransformerConfig
from sage_grpo_jax.parallel import hosts, sharding


def check(config: schema.LoraConfig, transformer: TransformerConfig, params: Any) -> None:
    """Checks targets against the model, and the adapters to start from against both.

    Args:
      config: of the adapters.
      transformer: the model's config.
      params: the shapes of its parameters.

    Raises:
      ValueError: naming the field.
    """
    adapters, model = config.adapters, registry.of(transformer)
    if adapters is None:
        return
    try:
        lora.abstract_adapters(params, adapters, model)
    except ValueError as error:
        raise ValueError(f"config.{error}") from error
    if not config.init:
        return

    with _naming_init():
        found = weights.open_adapters(config.init, transformer).lora
        # The start may lack layers, which then begin at 0. It may not have more than are trained:
        # what it does there would be lost without a word.
        more = {*lora.adapted_paths(found, model)} - {*lora.adapted_paths(adapters, model)}
        if more:
            raise ValueError(
                f"{config.init} adapts {', '.join(lora.targets_of(more, model))}; allowed: layers "
                "of lora.targets"
            )

        # A smaller rank is filled up, with zeros in B so that the product stays; a larger one would
        # have to be cut.
        if found.rank > adapters.rank:
            raise ValueError(
                f"{config.init} has rank {found.rank}; allowed: at most lora.rank={adapters.rank}"
            )


def load(
    config: schema.LoraConfig,
    transformer: TransformerConfig,
    mesh: jax.sharding.Mesh,
) -> tuple[Any, float]:
    """What `lora.start_from` takes: the adapters of `lora.init` on the mesh, {} without, and ratio.

    Raises:
      ValueError: naming the field: values that are not finite.
    """
    if not config.init:
        return {}, 1.0
    with _naming_init():
        given, found = weights.load_adapters(config.init, transformer)
    # A few hundred megabytes at most: every device has all of them.
    return hosts.to_global(given, sharding.replicated(mesh)), found.scale / config.adapters.scale


@contextlib.contextmanager
def _naming_init() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"config.lora.init: {error}") from error
