"""Puts a run together: networks onto the mesh, prompts into an embedding cache, the scorer."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
from absl import logging
from jax.experimental import multihost_utils

from sage_grpo_jax import weights
from sage_grpo_jax.data import embedding_cache, moving_shapes_spec, word_embeddings
from sage_grpo_jax.data import prompts as prompts_lib
from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import recipe as recipe_lib
from sage_grpo_jax.training import state as state_lib

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
WORLD = "moving_shapes:"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The two networks' configs, adapted to the run, and where their weights are."""

    transformer: hunyuan_video.HunyuanVideoConfig
    vae: vae.VaeConfig
    transformer_path: pathlib.Path
    vae_path: pathlib.Path


def resolve_path(path: str) -> pathlib.Path:
    """A folder of weights; `asset:NAME` is one that ships with the package."""
    return ASSETS / path.removeprefix("asset:") if path.startswith("asset:") else pathlib.Path(path)


def read_networks(config: config_lib.ModelConfig) -> Networks:
    """Reads both config.json files; no weights yet.

    Raises:
      ValueError: a folder holds another kind of network.
    """
    paths, configs = [], []
    for field, kind in (("transformer", hunyuan_video.HunyuanVideoConfig), ("vae", vae.VaeConfig)):
        path = resolve_path(getattr(config, field))
        if not getattr(config, field) or not path.is_dir():
            raise ValueError(
                f"config.model.{field}: got {getattr(config, field)!r}; allowed: a folder with "
                "config.json and safetensors, or asset:NAME"
            )
        network = weights.load_config(path)
        if not isinstance(network, kind):
            raise ValueError(
                f"config.model.{field}: {path} holds a {type(network).__name__}; "
                f"allowed: {kind.__name__}"
            )
        paths.append(path)
        configs.append(dataclasses.replace(network, dtype=config.compute_dtype))
    transformer = dataclasses.replace(
        configs[0], attention=config.attention, remat=config.remat, unroll=config.unroll
    )
    return Networks(transformer, configs[1], *paths)


def abstract_params(network: Any) -> Any:
    """Shapes of a network's parameters, without making any."""
    module = hunyuan_video if isinstance(network, hunyuan_video.HunyuanVideoConfig) else vae
    return jax.eval_shape(lambda key: module.init_params(network, key), jax.random.key(0))


def load_vae(networks: Networks, mesh: jax.sharding.Mesh) -> Any:
    """The VAE's parameters, on every device."""
    place = jax.tree.map(lambda _: sharding.replicated(mesh), abstract_params(networks.vae))
    return weights.load(networks.vae_path, networks.vae, place)


def load_transformer(networks: Networks, mesh: jax.sharding.Mesh) -> Any:
    """The transformer's parameters, sharded."""
    names = hunyuan_video.partition_names(networks.transformer)
    shardings = sharding.parameter_shardings(mesh, names, abstract_params(networks.transformer))
    return weights.load(networks.transformer_path, networks.transformer, shardings)


def make_abstract_state(
    networks: Networks, config: config_lib.Config, mesh: jax.sharding.Mesh
) -> state_lib.LearnerState:
    """The learner's state as shapes with shardings."""
    return state_lib.abstract_state(
        state_lib.make_optimizer(config),
        abstract_params(networks.transformer),
        hunyuan_video.partition_names(networks.transformer),
        mesh,
    )


def fresh_state(
    networks: Networks, config: config_lib.Config, mesh: jax.sharding.Mesh
) -> state_lib.LearnerState:
    """The state at step 0: loaded weights, empty optimizer, trust region around the weights."""
    tx = state_lib.make_optimizer(config)
    shardings = state_lib.shardings_of(make_abstract_state(networks, config, mesh))
    init = jax.jit(lambda params: state_lib.init_state(tx, params), out_shardings=shardings)
    return init(load_transformer(networks, mesh))


def build_programs(
    networks: Networks, config: config_lib.Config, mesh: jax.sharding.Mesh
) -> programs_lib.Programs:
    """The recipe's constants and its jitted programs."""
    recipe = recipe_lib.make_recipe(config, networks.transformer, networks.vae)
    tx = state_lib.make_optimizer(config)
    return programs_lib.build(recipe, tx, mesh, make_abstract_state(networks, config, mesh))


def read_prompts(source: str, field: str) -> list[prompts_lib.Prompt]:
    """The prompts of a file, or the captions of one split of the moving-shapes world.

    Raises:
      ValueError: naming the field.
    """
    if not source.startswith(WORLD):
        try:
            return prompts_lib.read_prompts(source)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"config.data.{field}: {error}") from error
    splits = {
        "train": moving_shapes_spec.train_captions,
        "held_out": moving_shapes_spec.held_out_captions,
    }
    split = source.removeprefix(WORLD)
    if split not in splits:
        raise ValueError(
            f"config.data.{field}: got {source!r}; allowed: a prompts file, "
            + ", ".join(WORLD + name for name in splits)
        )
    return [prompts_lib.Prompt(text.replace(" ", "_"), text) for text in splits[split]()]


def open_cache(
    source: str, field: str, workdir: pathlib.Path, dim: int
) -> embedding_cache.EmbeddingCache:
    """The embeddings of the prompts, written into the workdir the first time."""
    prompts = read_prompts(source, field)
    # The folder's name holds the prompts, so that an edited file is embedded again.
    digest = hashlib.sha256(repr((dim, prompts)).encode()).hexdigest()[:12]
    path = workdir / "embeddings" / f"{field}-{digest}"
    if jax.process_index() == 0 and not path.exists():
        word_embeddings.write_cache(path, prompts, dim)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"embeddings/{field}")
    return embedding_cache.EmbeddingCache(path)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a run."""

    train: grain.DatasetIterator  # endless, checkpointable
    evaluation: learner_lib.PromptBatch
    negative: learner_lib.PromptBatch

    def __iter__(self) -> Iterator[learner_lib.PromptBatch]:
        return learner_lib.batches(self.train)


def open_prompts(config: config_lib.Config, workdir: pathlib.Path, dim: int) -> Prompts:
    """Opens the training prompts (shuffled, repeated) and fixes those of the evaluation.

    Raises:
      ValueError: prompts that cannot be read, or too few for the evaluation.
    """
    length = config.data.max_text_tokens
    train = open_cache(config.data.train_prompts, "train_prompts", workdir, dim)
    evaluation = open_cache(config.data.eval_prompts, "eval_prompts", workdir, dim)
    if config.eval.num_prompts > len(evaluation):
        raise ValueError(
            f"config.eval.num_prompts: got {config.eval.num_prompts}; allowed: at most the "
            f"{len(evaluation)} prompts of {config.data.eval_prompts}"
        )
    fixed = embedding_cache.make_prompt_iterator(
        evaluation, config.eval.num_prompts, config.eval.seed, length=length, repeat=False
    )
    negative = embedding_cache.pad_entries([train.negative], length)
    logging.info("%d training prompts, %d evaluation prompts", len(train), config.eval.num_prompts)
    return Prompts(
        train=embedding_cache.make_prompt_iterator(
            train, config.rollout.prompts_per_step, config.seed, length=length
        ),
        evaluation=next(learner_lib.batches(fixed)).repeat(config.eval.samples_per_prompt),
        negative=next(learner_lib.batches(iter([negative]))),
    )
