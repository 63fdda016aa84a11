"""A random network pair of a few thousand parameters, and a recipe that trains it in seconds."""

import dataclasses
import pathlib
from concurrent import futures

import jax
import numpy as np
import pytest
import two_experts

from sage_grpo_jax import weights
from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.rewards import types
from sage_grpo_jax.rewards.backends import moving_shapes

TRANSFORMER = hunyuan_video.HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    text_embed_dim=8,
    text_embed_2_dim=None,
    image_embed_dim=None,
    rope_axes_dim=(4, 2, 2),
)
VAE = vae.VaeConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 8, 8),
    layers_per_block=1,
    spatial_compression_ratio=8,
    temporal_compression_ratio=4,
    scaling_factor=1.0,
)


KEY = jax.eval_shape(lambda: jax.random.key(0))


def _draw(shape: jax.ShapeDtypeStruct, rng: np.random.Generator) -> np.ndarray:
    """Random weights of a scale that keeps activations near 1; drawn without compiling anything."""
    scale = 0.7 / np.sqrt(np.prod(shape.shape[-2:-1])) if len(shape.shape) > 1 else 0.1
    return (scale * rng.standard_normal(shape.shape)).astype(shape.dtype)


@pytest.fixture(scope="session")
def tiny_networks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with `transformer` and `vae`; no parameter is zero, so every gradient flows."""
    folder = tmp_path_factory.mktemp("networks")
    for name, module, config in (
        ("transformer", hunyuan_video, TRANSFORMER),
        ("vae", vae, VAE),
    ):
        shapes = jax.eval_shape(lambda key, m=module, c=config: m.init_params(c, key), KEY)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda s, rng=rng: _draw(s, rng), shapes)
        weights.save(params, folder / name, config=config)
    return folder


@pytest.fixture(scope="session")
def tiny_overrides(tiny_networks: pathlib.Path) -> dict[str, object]:
    """Overrides of the default recipe, by dotted name."""
    return {
        "num_steps": 2,
        "model.transformer": str(tiny_networks / "transformer"),
        "model.vae": str(tiny_networks / "vae"),
        "model.remat": False,
        "video.frames": 5,
        "video.height": 32,
        "video.width": 32,
        "video.fps": 8.0,
        "data.train_prompts": "moving_shapes:train",
        "data.eval_prompts": "moving_shapes:validation",
        "data.test_prompts": "moving_shapes:test",
        "rollout.num_steps": 4,
        "rollout.shift": 3.0,
        # P ≠ G: a program that swaps the two must fail.
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 8,
        "rollout.decode_batch": 8,
        "loss.micro_batch": 8,
        "optimizer.learning_rate": 1e-3,
        "rewards.budget_seconds": 60.0,
        "eval.num_prompts": 4,
        "eval.num_test_prompts": 2,
        "eval.num_steps": 2,
        "eval.sheet_prompts": 2,
        "eval.manifold_distance": False,
        "checkpoint.every": 1,
        "mesh.fsdp": 1,
    }


@pytest.fixture
def make_config(tiny_overrides):
    """make_config(**{"a.b": value}) -> validated `Config` of the tiny recipe."""

    def make(overrides: dict[str, object] | None = None) -> schema.Config:
        config = schema.default_config()
        config.update_from_flattened_dict({**tiny_overrides, **(overrides or {})})
        return builder.from_config_dict(config)

    return make


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the weights of `two_experts`, random."""
    folder, config = tmp_path_factory.mktemp("experts") / "transformer", two_experts.Config()
    shapes = jax.eval_shape(lambda key: two_experts.init_params(config, key), KEY)
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        two_experts.register(patch)
        weights.save(jax.tree.map(lambda s: _draw(s, rng), shapes), folder, config=config)
    return folder


@pytest.fixture
def make_small_config(make_config, tiny_experts, monkeypatch):
    """`make_config` for what comes before and after the velocity: in place of the DiT, whose many
    parameters take long to compile an optimizer for, the network of a hundred numbers.
    """
    two_experts.register(monkeypatch)
    given = {"model.transformer": str(tiny_experts)}
    return lambda overrides=None: make_config({**given, **(overrides or {})})


@dataclasses.dataclass
class LocalScorer:
    """Scores in this process, with the backend that the service hosts; failures on demand."""

    failing: frozenset[int] = frozenset()  # sample numbers (the end of the request id)
    calls: int = 0
    fingerprint: str = "local"

    def submit(self, video, prompt, request_id, fps) -> futures.Future:
        """See `scoring.Scorer`."""
        self.calls += 1
        future: futures.Future = futures.Future()
        if int(request_id.rpartition("/")[2]) in self.failing:
            future.set_result(types.RewardResult(False, types.INTERNAL, "on demand"))
            return future
        scores = moving_shapes.MovingShapesBackend().score(video, prompt, fps)
        values = {name: score.normalised for name, score in scores.items()}
        future.set_result(types.RewardResult(True, types.OK, scores=values))
        return future


@pytest.fixture
def local_scorer() -> type[LocalScorer]:
    """The class, so that tests can ask for failures."""
    return LocalScorer


@pytest.fixture
def one_device():
    """A mesh of one device, set for the test."""
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh
