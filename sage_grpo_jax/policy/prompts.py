"""The prompts of a run: texts or captions, their embeddings in a cache, batches of them."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import grain
import jax
from absl import logging
from jax.experimental import multihost_utils

from sage_grpo_jax.config import schema
from sage_grpo_jax.data import embedding_cache
from sage_grpo_jax.data import prompts as prompts_lib
from sage_grpo_jax.models import door, frames, registry
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy.networks import Networks
from sage_grpo_jax.worlds.moving_shapes import captions, word_embeddings
from sage_grpo_jax.worlds.moving_shapes import spec as moving_shapes_spec

WORLD = "moving_shapes:"
CACHE = "cache:"


def read_prompts(source: str, field: str) -> list[prompts_lib.Prompt]:
    """The prompts of a text file, or the captions of one split of the moving-shapes world.

    Raises:
      ValueError: naming the field.
    """
    if not source.startswith(WORLD):
        try:
            return prompts_lib.read_prompts(source)
        except (OSError, ValueError) as error:
            raise ValueError(f"config.data.{field}: {error}") from error
    split = source.removeprefix(WORLD)
    if split not in moving_shapes_spec.SPLITS:
        raise ValueError(
            f"config.data.{field}: got {source!r}; allowed: a prompts file, "
            + ", ".join(WORLD + name for name in moving_shapes_spec.SPLITS)
        )
    captions = moving_shapes_spec.split_captions(split)
    # The id of a prompt decides its noise, so it follows from the caption alone.
    return [prompts_lib.Prompt(text.replace(" ", "_"), text) for text in captions]


def open_cache(
    config: schema.Config,
    field: str,
    workdir: pathlib.Path,
    networks: Networks,
    *,
    whole_captions: bool = False,
) -> embedding_cache.EmbeddingCache:
    """The embeddings of the prompts of `config.data.FIELD`.

    Either they were made before (`cache:FOLDER`), or they are word embeddings, which are written
    into the workdir the first time.

    Args:
      config: the recipe.
      field: train_prompts or eval_prompts.
      workdir: see above.
      networks: that the embeddings have to fit.
      whole_captions: see `captions.check`.

    Raises:
      ValueError: no such cache, or one that does not fit the model; prompts that the small world
        cannot say; naming the field.
    """
    source = getattr(config.data, field)
    dim = _needs(networks).text

    # Made before, by a text encoder
    if source.startswith(CACHE):
        try:
            cache = embedding_cache.EmbeddingCache(source.removeprefix(CACHE))
            _check_fits(cache, config, networks)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"config.data.{field}: {error}") from error
        return cache

    # Made here, from the words of the captions: only the small world has few enough of them
    if config.data.text_encoder != "words":
        raise ValueError(
            f"config.data.{field}: got {source!r}; allowed: {CACHE}FOLDER, written by "
            "python -m sage_grpo_jax.encode_prompts"
        )

    prompts = read_prompts(source, field)
    try:
        captions.check(prompts, whole=whole_captions)
    except ValueError as error:
        raise ValueError(f"config.data.{field}: {source}: {error}") from error
    # The folder's name holds the prompts, so that an edited file is embedded again.
    digest = hashlib.sha256(repr((dim, prompts)).encode()).hexdigest()[:12]
    path = workdir / "embeddings" / f"{field}-{digest}"
    if jax.process_index() == 0 and not path.exists():
        word_embeddings.write_cache(path, prompts, dim)
    # The others read what the first one writes, from the file system that they share.
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"embeddings/{field}")
    return embedding_cache.EmbeddingCache(path)


def _check_fits(
    cache: embedding_cache.EmbeddingCache, config: schema.Config, networks: Networks
) -> None:
    needs, encoder, wants_frame = _needs(networks), None, False
    if config.model.variant:
        # The encoder that the model learned to read is known; others may be as wide.
        released = registry.released(registry.TRANSFORMER, config.model.variant)
        of_variant = registry.of(released).embedding_needs(released)
        encoder, wants_frame = of_variant.encoder, of_variant.first_frame
    if config.data.text_encoder == "words":
        encoder = word_embeddings.encoder(needs.text).name

    # The latent of a first frame, [h, w, C], was encoded for one size of clip.
    video, latent_shape = config.video, None
    if wants_frame or cache.image_shape is not None:
        latent_shape = frames.latent_shape(networks.vae, 1, video.height, video.width)[1:]
    cache.check_fits(
        encoder=encoder,
        text_dim=needs.text,
        byt5_dim=needs.byt5,
        image_dim=needs.image,
        latent_shape=latent_shape,
    )


def _needs(networks: Networks) -> door.EmbeddingNeeds:
    return registry.of(networks.transformer).embedding_needs(networks.transformer)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a run."""

    train: grain.DatasetIterator  # endless, checkpointable
    fingerprint: str  # of the training prompts: the iterator's position fits these only
    encoder: embedding_cache.Encoder  # of all embeddings
    evaluation: conditions.PromptBatch
    test: conditions.PromptBatch | None  # None: the recipe has no test prompts
    negative: conditions.PromptBatch

    def __iter__(self) -> Iterator[conditions.PromptBatch]:
        return conditions.batches(self.train)


def open_prompts(config: schema.Config, workdir: pathlib.Path, networks: Networks) -> Prompts:
    """Opens the training prompts (shuffled, repeated) and fixes those of the evaluation.

    Raises:
      ValueError: prompts that cannot be read, too few for the evaluation, or embeddings of
        different encoders.
    """
    # This reward reads the caption: on any other it would fail for every clip.
    whole = config.rewards.spawn and config.rewards.backend == "moving_shapes"
    train = open_cache(config, "train_prompts", workdir, networks, whole_captions=whole)
    fixed = {
        field: open_cache(config, field, workdir, networks, whole_captions=whole)
        for field in ("eval_prompts", "test_prompts")
        if getattr(config.data, field) or field == "eval_prompts"
    }

    # How many of them are fixed for the whole run; all test prompts unless a number is given
    counts = {"eval_prompts": config.eval.num_prompts}
    for field, cache in fixed.items():
        counts.setdefault(field, config.eval.num_test_prompts or len(cache))
        _check_fixed(config, field, cache, counts[field], train)

    # Every batch of a run has the same lengths: one compilation
    shapes = _static_shapes(config, networks, train, *fixed.values())
    batches = {
        field: _fixed_batch(cache, counts[field], config.eval, shapes)
        for field, cache in fixed.items()
    }
    negative = embedding_cache.pad_entries([train.negative], **shapes)

    logging.info("%d training prompts, %d evaluation prompts", len(train), config.eval.num_prompts)
    return Prompts(
        train=embedding_cache.make_prompt_iterator(
            train, config.rollout.prompts_per_step, config.seed, **shapes
        ),
        fingerprint=train.fingerprint,
        encoder=train.encoder,
        evaluation=batches["eval_prompts"],
        test=batches.get("test_prompts"),
        negative=next(conditions.batches(iter([negative]))),
    )


def _check_fixed(
    config: schema.Config,
    field: str,
    cache: embedding_cache.EmbeddingCache,
    count: int,
    train: embedding_cache.EmbeddingCache,
) -> None:
    """Refuses evaluation or test prompts of another encoder, or too few of them."""
    source = getattr(config.data, field)
    # Embeddings of another encoder may have the same shape, and mean something else to the model.
    if differing := cache.encoder.differences(train.encoder):
        raise ValueError(
            f"config.data.{field}: {source} comes from another encoder than "
            f"config.data.train_prompts: {differing}; allowed: embeddings of the same encoder"
        )
    if count > len(cache):
        number = {"eval_prompts": "num_prompts", "test_prompts": "num_test_prompts"}[field]
        raise ValueError(
            f"config.eval.{number}: got {count}; allowed: at most the {len(cache)} prompts of "
            f"{source}"
        )


def _fixed_batch(
    cache: embedding_cache.EmbeddingCache,
    count: int,
    settings: schema.EvalConfig,
    shapes: dict[str, int | None],
) -> conditions.PromptBatch:
    """`count` prompts, the same in every run, each `samples_per_prompt` times in a row."""
    # The order follows from the seed of the evaluation, not from that of the run: runs that are
    # compared see the same prompts.
    chosen = embedding_cache.make_prompt_iterator(
        cache, count, settings.seed, repeat=False, **shapes
    )
    return next(conditions.batches(chosen)).repeat(settings.samples_per_prompt)


def _static_shapes(
    config: schema.Config, networks: Networks, *caches: embedding_cache.EmbeddingCache
) -> dict[str, int | None]:
    """Lengths that hold the prompts of all caches: one compilation for training and evaluation."""
    length = config.data.max_text_tokens or embedding_cache.text_bucket(
        max(cache.max_length for cache in caches)
    )
    quoted = max(cache.byt5_max_length for cache in caches)

    # Without quoted text in any prompt its branch is left out of the program; masked tokens would
    # be computed all the same.
    if not quoted:
        return {"length": length, "byt5_length": None, "byt5_dim": None}
    return {
        "length": length,
        "byt5_length": embedding_cache.text_bucket(quoted, embedding_cache.BYT5_LENGTHS),
        "byt5_dim": _needs(networks).byt5,
    }
