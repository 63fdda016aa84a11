"""Small random networks, as diffusers' models and as the folders that diffusers writes of them."""

import dataclasses
import pathlib

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.models import model_config
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig

TRANSFORMER = HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    text_embed_dim=8,
    text_embed_2_dim=6,
    image_embed_dim=5,
    rope_axes_dim=(4, 4, 4),
    remat=False,
)
VAE = VaeConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 8),
    layers_per_block=1,
    spatial_compression_ratio=4,
    temporal_compression_ratio=2,
    scaling_factor=1.3,
)


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """Threads that wait for each other take longer than these small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Reference:
    """diffusers' models; their folders are `path`/transformer and `path`/vae."""

    transformer: HunyuanVideo15Transformer3DModel
    vae: AutoencoderKLHunyuanVideo15
    path: pathlib.Path


def _randomise(model: torch.nn.Module) -> None:
    """Weights that keep activations near 1; no parameter is zero, so that every part shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 50.0
            parameter.normal_(std=fan_in**-0.5)
            if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)


def _without(config, *names: str) -> dict:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in names}


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory):
    """make_reference(**fields of the transformer's config) -> Reference."""

    def make(**fields) -> Reference:
        torch.manual_seed(0)
        config = dataclasses.replace(TRANSFORMER, **fields)
        transformer = HunyuanVideo15Transformer3DModel(
            **_without(config, *model_config.RUNTIME_FIELDS)
        )
        vae = AutoencoderKLHunyuanVideo15(**_without(VAE, "dtype"))
        _randomise(transformer)
        path = tmp_path_factory.mktemp("reference")
        transformer.save_pretrained(path / "transformer")
        vae.save_pretrained(path / "vae")
        return Reference(transformer.eval(), vae.eval(), path)

    return make


@pytest.fixture(scope="session")
def reference(make_reference) -> Reference:
    """The plain text-to-video pair."""
    return make_reference()


@pytest.fixture
def make_config(reference):
    """make_config(**{"a.b": value}) -> a validated recipe of clips of 3 frames of 16 × 16."""

    def make(overrides: dict[str, object] | None = None) -> schema.Config:
        config = schema.default_config()
        values = {
            "model.transformer": str(reference.path / "transformer"),
            "model.vae": str(reference.path / "vae"),
            "model.remat": False,
            "video.frames": 3,
            "video.height": 16,
            "video.width": 16,
            "video.fps": 8.0,
            "rollout.shift": 5.0,
            "rollout.guidance": 2.0,
            "rollout.decode_batch": 2,
            "eval.num_steps": 2,
            "mesh.fsdp": 1,
        }
        config.update_from_flattened_dict({**values, **(overrides or {})})
        return builder.from_config_dict(config)

    return make
