"""Which networks a run has: where their weights lie, and their configs, before any weights."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from sage_grpo_jax import weights
from sage_grpo_jax.config import schema
from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import AutoencoderConfig, TransformerConfig

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
ASSET = "asset:"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The two networks' configs, adapted to the run, and where their weights are."""

    transformer: TransformerConfig
    vae: AutoencoderConfig
    transformer_path: pathlib.Path
    vae_path: pathlib.Path


def resolve_path(path: str) -> pathlib.Path:
    """A folder or file of weights; `asset:NAME` is one that ships with the package."""
    return ASSETS / path.removeprefix(ASSET) if path.startswith(ASSET) else pathlib.Path(path)


def read_networks(config: schema.ModelConfig) -> Networks:
    """Reads both config.json files; no weights yet.

    Raises:
      ValueError: no folder or file there, no config, or that of another kind of network.
    """
    paths, configs = [], []
    for field, kind in (("transformer", registry.TRANSFORMER), ("vae", registry.AUTOENCODER)):
        path = resolve_path(getattr(config, field))
        if not getattr(config, field) or not path.exists():
            raise ValueError(
                f"config.model.{field}: got {getattr(config, field)!r}; allowed: a folder with "
                "config.json and safetensors, a file of weights beside its config.json, or "
                "asset:NAME"
            )

        try:
            network = _read_network(path, kind, config)
        except (ValueError, OSError) as error:
            raise ValueError(f"config.model.{field}: {error}") from error

        # Folders that were swapped would be found out much later, by a tensor that is missing.
        if registry.kind_of(network) != kind:
            raise ValueError(
                f"config.model.{field}: {path} holds a {registry.of(network).NAME}; "
                f"allowed: {kind}s"
            )
        paths.append(path)
        configs.append(network)

    if config.variant:
        _check_variant(configs[0], paths[0], config.variant)
    return _adapted(*configs, paths, config)


def _check_variant(transformer: TransformerConfig, path: pathlib.Path, variant: str) -> None:
    """Refuses weights that say themselves that they are not those of the variant."""
    released = registry.released(registry.TRANSFORMER, variant)
    if registry.name_of(transformer) != registry.name_of(released):
        raise ValueError(
            f"config.model.transformer: {path} holds a {registry.of(transformer).NAME}, "
            f"config.model.variant={variant} is a {registry.of(released).NAME}; allowed: weights "
            "of the variant"
        )
    # A config.json tells no more than this: many variants of a model differ in their weights alone.
    for field in registry.of(transformer).VARIANT_FIELDS:
        if (found := getattr(transformer, field)) != getattr(released, field):
            raise ValueError(
                f"config.model.transformer: {field}={found} in {path} is not that of "
                f"config.model.variant={variant}; allowed: weights of the variant"
            )


def _adapted(
    transformer: TransformerConfig,
    autoencoder: AutoencoderConfig,
    paths: Sequence[pathlib.Path],
    config: schema.ModelConfig,
) -> Networks:
    """The networks as a run computes them."""
    # Numerics and memory belong to the run, not to the weights: config.json says nothing of them.
    transformer = dataclasses.replace(
        transformer,
        dtype=config.compute_dtype,
        attention=config.attention,
        remat=config.remat,
        unroll=config.unroll,
    )
    return Networks(
        transformer, dataclasses.replace(autoencoder, dtype=config.compute_dtype), *paths
    )


def _read_network(path: pathlib.Path, kind: str, config: schema.ModelConfig) -> Any:
    """The config of the weights in a folder, or in one file, which may belong to a release."""
    if path.is_file() and not path.with_name("config.json").exists():
        if not config.variant:
            raise ValueError(
                f"{path} has no config.json beside it; allowed: a file that has one (or "
                "config.model.variant, for the released weights)"
            )
        return registry.released(kind, config.variant)
    return weights.load_config(path)


def describe_networks(config: schema.ModelConfig) -> Networks:
    """The networks' configs without their weights: where those are not here, as released.

    Raises:
      ValueError: no folders, and no released variant either.
    """
    paths = resolve_path(config.transformer), resolve_path(config.vae)
    # Weights that are here speak for themselves, even where a variant is named.
    if all(path.exists() for path in paths) or not config.variant:
        return read_networks(config)
    transformer = registry.released(registry.TRANSFORMER, config.variant)
    autoencoder = registry.released(registry.AUTOENCODER, config.variant)
    return _adapted(transformer, autoencoder, paths, config)


def abstract_params(network: Any) -> Any:
    """Shapes of a network's parameters, without making any."""
    model = registry.of(network)
    return jax.eval_shape(lambda key: model.init_params(network, key), jax.random.key(0))
