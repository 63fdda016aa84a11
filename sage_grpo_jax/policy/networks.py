"""Which networks a run has: where their weights lie, and their configs, before any weights."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from sage_grpo_jax import weights
from sage_grpo_jax.config import schema
from sage_grpo_jax.models import hunyuan_video, vae

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
ASSET = "asset:"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The two networks' configs, adapted to the run, and where their weights are."""

    transformer: hunyuan_video.HunyuanVideoConfig
    vae: vae.VaeConfig
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
    for field, kind in (("transformer", hunyuan_video.HunyuanVideoConfig), ("vae", vae.VaeConfig)):
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
        if not isinstance(network, kind):
            raise ValueError(
                f"config.model.{field}: {path} holds a {type(network).__name__}; "
                f"allowed: {kind.__name__}"
            )
        paths.append(path)
        configs.append(network)
    if config.variant and configs[0].use_meanflow != _is_meanflow(config.variant):
        raise ValueError(
            f"config.model.transformer: use_meanflow={configs[0].use_meanflow} in {paths[0]} is "
            f"not that of config.model.variant={config.variant}; allowed: weights of the variant"
        )
    return _adapted(*configs, paths, config)


def _adapted(
    transformer: hunyuan_video.HunyuanVideoConfig,
    autoencoder: vae.VaeConfig,
    paths: Sequence[pathlib.Path],
    config: schema.ModelConfig,
) -> Networks:
    """The networks as a run computes them."""
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


def _read_network(path: pathlib.Path, kind: type, config: schema.ModelConfig) -> Any:
    """The config of the weights in a folder, or in one file, which may belong to a release."""
    if path.is_file() and not path.with_name("config.json").exists():
        if not config.variant:
            raise ValueError(
                f"{path} has no config.json beside it; allowed: a file that has one (or "
                "config.model.variant, for the released weights)"
            )
        return _released(kind, config)
    return weights.load_config(path)


def _released(kind: type, config: schema.ModelConfig) -> Any:
    """The config of a released variant's transformer or VAE."""
    if kind is vae.VaeConfig:
        return vae.VaeConfig()
    return hunyuan_video.HunyuanVideoConfig(
        target_size=960 if config.variant.startswith("720p") else 640,
        task_type="i2v" if "i2v" in config.variant else "t2v",
        use_meanflow=_is_meanflow(config.variant),
    )


def describe_networks(config: schema.ModelConfig) -> Networks:
    """The networks' configs without their weights: where those are not here, as released.

    Raises:
      ValueError: no folders, and no released variant either.
    """
    paths = resolve_path(config.transformer), resolve_path(config.vae)
    if all(path.exists() for path in paths) or not config.variant:
        return read_networks(config)
    transformer = _released(hunyuan_video.HunyuanVideoConfig, config)
    return _adapted(transformer, _released(vae.VaeConfig, config), paths, config)


def _is_meanflow(variant: str) -> bool:
    """Whether a released variant knows where its steps end."""
    return variant.endswith("step_distilled")
