"""The doors that files of others come through: for each a good folder, and who reads it.

Every reader takes a folder like the good one, reads all that is in it, and either returns or
raises what an entry of the package turns into one line.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax import weights
from sage_grpo_jax.data import embedding_cache
from sage_grpo_jax.data.prompts import Prompt
from sage_grpo_jax.models import hunyuan_video, lora, vae
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.vae import VaeConfig
from sage_grpo_jax.training import checkpoint, state
from sage_grpo_jax.weights import conversion, store
from sage_grpo_jax.weights.formats import orbax_io, safetensors_io
from sage_grpo_jax.weights.formats.source import Source, pieces
from sage_grpo_jax.weights.sources import FiniteSource, TreeSource

DIT = HunyuanVideoConfig(
    in_channels=5,
    out_channels=2,
    num_attention_heads=1,
    attention_head_dim=8,
    num_layers=2,
    num_refiner_layers=2,
    mlp_ratio=1.0,
    text_embed_dim=3,
    text_embed_2_dim=None,
    image_embed_dim=2,
    rope_axes_dim=(4, 2, 2),
)
VAE = VaeConfig(
    latent_channels=1,
    block_out_channels=(4, 4),
    layers_per_block=1,
    spatial_compression_ratio=2,
    temporal_compression_ratio=1,
)
LORA = lora.LoraConfig(2, 3.0, ("query", "mlp/in", "text_refiner/blocks/value", "final/proj"))


class Door(NamedTuple):
    """How the good folder is written, how a folder is read, and its share of all cases."""

    write: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], None]
    share: int


def _tree(shapes, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def _params(config):
    module = hunyuan_video if isinstance(config, HunyuanVideoConfig) else vae
    return _tree(jax.eval_shape(lambda key: module.init_params(config, key), jax.random.key(0)))


def _write_model(config, format: str, **options) -> Callable[[pathlib.Path], None]:
    def write(folder: pathlib.Path) -> None:
        source = TreeSource(_params(config))
        store.write_model(folder, config, source, format, **options)

    return write


def _read_all(source: Source, where: pathlib.Path) -> None:
    source = FiniteSource(source, where)
    for path, shape in source.shapes.items():
        for index in pieces(path, shape):
            source.read(path, index)


def _read_model(folder: pathlib.Path) -> None:
    """As `train` and `sample` open weights; the values without devices, for speed."""
    _read_all(store.open_source(folder, weights.load_config(folder)), folder)


def _convert(layout: str) -> Callable[[pathlib.Path], None]:
    """As `convert` opens weights: the config may come from the tensors."""

    def read(folder: pathlib.Path) -> None:
        _read_all(conversion._open_tensors(folder, layout)[1], folder)

    return read


def _read_orbax(folder: pathlib.Path) -> None:
    """Slices, as `convert`; then, for seconds, all of it onto a device, as `sample`."""
    config = weights.load_config(folder)
    _read_all(store.open_source(folder, config, "orbax"), folder)
    if not folder.name.endswith("0"):
        return
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda key: hunyuan_video.init_params(DIT, key), jax.random.key(0))
    weights.load(folder, config, jax.tree.map(lambda _: place, shapes))


def _write_torch(folder: pathlib.Path) -> None:
    import torch  # the oracle; the readers do without

    _write_model(DIT, "tencent")(folder)
    file = next(folder.glob("*.safetensors"))
    tensors = {name: torch.tensor(t.read()) for name, t in safetensors_io.read_files(file).items()}
    first = next(iter(tensors))
    tensors[first] = tensors[first].transpose(0, 1).contiguous().transpose(0, 1)
    content = {"module": tensors, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}},
               "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0]}]}}  # fmt: skip
    torch.save(content, folder / "model.pt")
    file.unlink()


def _write_adapters(format: str) -> Callable[[pathlib.Path], None]:
    def write(folder: pathlib.Path) -> None:
        shapes = jax.eval_shape(lambda key: hunyuan_video.init_params(DIT, key), jax.random.key(0))
        adapters = _tree(lora.abstract_adapters(shapes, LORA, hunyuan_video), 1)
        weights.save_adapters(adapters, folder, LORA, DIT, format)
        if format == "peft":  # peft's own form: settings in a file beside, a file of torch.save
            import torch

            _beside_as_peft(folder, torch)

    return write


def _beside_as_peft(folder: pathlib.Path, torch) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors, metadata = safetensors_io.read_file(file)
    settings = metadata["lora_adapter_metadata"].replace("transformer.", "")
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text(settings)
    values = {name: torch.tensor(tensor.read()) for name, tensor in tensors.items()}
    torch.save(values, folder / "peft" / "adapter_model.bin")


def _read_adapters(folder: pathlib.Path) -> None:
    _read_all(weights.open_adapters(folder, DIT).source, folder)
    if (folder / "peft").exists():
        _read_all(weights.open_adapters(folder / "peft", DIT).source, folder)


def _write_run(folder: pathlib.Path) -> None:
    """What a training run leaves: a checkpoint of orbax's own, in its database format."""
    shapes = jax.eval_shape(lambda key: hunyuan_video.init_params(DIT, key), jax.random.key(0))
    adapters = _tree(lora.abstract_adapters(shapes, LORA, hunyuan_video), 1)
    folder.mkdir()
    (folder / "transformer.json").write_text(DIT.to_json())
    described = {**dataclasses.asdict(LORA), "base": "nowhere"}
    (folder / "lora.json").write_text(json.dumps(described))
    saver = checkpoint.Checkpoints(folder, every=1, keep=1)
    content = state.LearnerState(jax.tree.map(jnp.asarray, adapters), {}, jnp.asarray(3))
    saver.save(3, content, {"position": np.asarray(3)}, {"seed": 1})
    saver.close()


def _read_run(folder: pathlib.Path) -> None:
    """As `convert` opens a run, and `sample`."""
    step = orbax_io.latest_checkpoint(folder / "checkpoints")
    job = conversion.Job(
        folder, "orbax", folder.with_name(f"{folder.name}-out"), "orbax", run_step=step
    )
    _read_all(conversion._open(job).source, folder)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda key: hunyuan_video.init_params(DIT, key), jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        lora.abstract_adapters(shapes, LORA, hunyuan_video),
    )
    checkpoint.restore_params(folder, abstract)


def _read_run_adapters(folder: pathlib.Path) -> None:
    job = conversion.Job(folder, "orbax", folder.with_name(f"{folder.name}-out"), "orbax")
    _read_all(conversion._open(job).source, folder)


def _write_cache(folder: pathlib.Path) -> None:
    encoder = embedding_cache.Encoder("test", "abc", {"numpy": "1"}, {"text_encoder": "a" * 64})
    rng = np.random.default_rng(2)
    with embedding_cache.EmbeddingCacheWriter(folder, encoder, "float32") as writer:
        for i in range(3):
            arrays = {"text": rng.standard_normal((1 + i, 4)), "image": np.ones((2, 5)),
                      "image_latents": np.ones((1, 2, 2, 3))}  # fmt: skip
            if i == 1:
                arrays["byt5"] = rng.standard_normal((2, 3))
            writer.add(Prompt(f"id{i}", f"prompt {i}"), **arrays)
        writer.set_negative(np.ones((1, 4)))


def _read_cache(folder: pathlib.Path) -> None:
    cache = embedding_cache.EmbeddingCache(folder)
    cache.pad([cache[i] for i in range(len(cache))])
    cache.negative  # noqa: B018 (it is read)


DOORS = {
    "single": Door(_write_model(DIT, "diffusers"), _read_model, 14),
    "shards": Door(_write_model(DIT, "diffusers", max_shard_size=6000), _read_model, 14),
    "tencent": Door(_write_model(DIT, "tencent"), _convert("tencent"), 10),
    "vae": Door(_write_model(VAE, "diffusers"), _read_model, 8),
    "vae_tencent": Door(_write_model(VAE, "tencent"), _convert("tencent"), 6),
    "torch": Door(_write_torch, _convert("tencent"), 16),
    "adapters": Door(_write_adapters("peft"), _read_adapters, 14),
    "run_adapters": Door(_write_adapters("orbax"), _read_run_adapters, 4),
    "run": Door(_write_run, _read_run, 4),
    "orbax": Door(_write_model(DIT, "orbax"), _read_orbax, 4),
    "cache": Door(_write_cache, _read_cache, 10),
}
