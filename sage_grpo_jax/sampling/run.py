"""One call of `sample`: opens prompts and weights, samples batch by batch, writes the clips.

Every process of a pod runs this. All take part in every batch; each reads the embeddings of its
own rows and writes their files. Process 0 keeps the record, so that a rerun skips what is finished.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sage_grpo_jax.common import folders
from sage_grpo_jax.common import progress as progress_lib
from sage_grpo_jax.config import schema
from sage_grpo_jax.data import embedding_cache, media
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.policy.sampler import Sampler, key_data
from sage_grpo_jax.sampling import outputs, sources
from sage_grpo_jax.sampling import settings as settings_lib
from sage_grpo_jax.training import input_checks
from sage_grpo_jax.training import workdir as workdir_lib
from sage_grpo_jax.training.blueprint import Blueprint
from sage_grpo_jax.worlds.moving_shapes import captions, spec


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for, besides the recipe.

    Attributes:
      source: the weights.
      prompts: a text file, moving_shapes:held_out, or the folder of an embedding cache.
      out: folder of the clips.
      seeds: of each prompt.
      batch_size: samples at a time, on all devices together; None: what the recipe decodes.
      overrides: values of `settings.Settings` in place of the recipe's; None: the recipe's.
    """

    source: sources.Source
    prompts: str
    out: pathlib.Path
    seeds: Sequence[int] = (0,)
    batch_size: int | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


def sample(
    config: schema.Config, request: Request, devices: Sequence[jax.Device] | None = None
) -> int:
    """Makes all clips that are not there yet; returns how many were made.

    Args:
      config: the recipe.
      request: see there.
      devices: of the mesh; None: all.

    Raises:
      ValueError, FileNotFoundError: bad input.
    """
    # What is asked for, refused before anything large is read.
    settings = settings_lib.from_config(config, **request.overrides)
    config = sources.adapt_config(_with_clip(config, settings), request.source)
    networks = _read_networks(config, request.source)
    settings_lib.check_clip(settings, networks.transformer, networks.vae)
    mesh = input_checks.make_mesh(config, devices)
    _check_batch_size(request.batch_size, mesh)

    # Prompts. The folder has to be there: embeddings of the small world are written into it.
    workdir_lib.make_folder(request.out, "--out")
    cache = _open_prompts(config, request, networks)
    if request.source.checkpoint:
        run = pathlib.Path(request.source.checkpoint)
        workdir_lib.check_encoder(cache.encoder, f"--prompts: {request.prompts}", run)
    # One entry at a time: all of them may be larger than memory.
    prompts = [
        (entry["id"], entry["prompt"]) for entry in map(cache.__getitem__, range(len(cache)))
    ]
    _note_incomplete(config, request, [text for _, text in prompts])

    # What is left to do: finished clips of the same settings are kept.
    plan = outputs.plan(prompts, request.seeds)
    described = dataclasses.asdict(settings) | sources.describe(networks, request.source)
    records = outputs.Records(request.out, described)
    left = _unfinished(plan, records, settings.suffixes)

    # Only now the names of the files are known; somebody else's file of such a name is refused.
    names = _names(left, settings.suffixes)
    workdir_lib.make_folder(request.out, "--out", names, "samples", lambda: bool(records))

    # Sampling. A rerun that has nothing left loads no weights.
    if left:
        size = request.batch_size or _default_batch_size(len(left), config, mesh)
        batches = _Batches(cache, config.data.max_text_tokens, size, mesh)
        blueprint = Blueprint(config, networks, mesh)
        with jax.set_mesh(mesh):
            sampler = Sampler(
                networks.transformer,
                networks.vae,
                sources.load(blueprint, request.source),
                blueprint.load_vae(),
                batches.negative,
                settings.sampling(networks.vae, config.model.matmul_precision),
                mesh,
                _decode_batch(size, config, mesh),
            )
            _sample_all(sampler, batches, left, records, settings, request.out)

    # The clips of all processes are there by now, on a disk that they share.
    if jax.process_index() == 0:
        outputs.write_sheet(request.out, plan, settings.suffixes[0])
        folders.settle(request.out, names)
    return len(left)


def _names(left: Sequence[outputs.Sample], suffixes: Sequence[str]) -> list[str]:
    """The files that will be written."""
    clips = [f"{sample.name}.{suffix}" for sample in left for suffix in suffixes]
    return [*clips, *([outputs.RECORDS] if left else []), outputs.SHEET]


def _sample_all(
    sampler: Sampler,
    batches: _Batches,
    left: Sequence[outputs.Sample],
    records: outputs.Records,
    settings: settings_lib.Settings,
    out: pathlib.Path,
) -> None:
    """Samples and writes; a batch enters the record when all processes have written their files."""
    first = jax.process_index() == 0
    # One process talks.
    with progress_lib.Progress(len(left), "videos", None if first else io.StringIO()) as progress:
        for start in range(0, len(left), batches.size):
            chosen = left[start : start + batches.size]
            # The last batch is filled up with its own samples: one shape, one compilation.
            rows = [chosen[i % len(chosen)] for i in range(batches.size)]
            keys = key_data([s.seed for s in rows], [s.id for s in rows])
            latents = sampler.sample(batches.read(rows), keys)
            for row, frames in sampler.decode(latents):
                if row < len(chosen):
                    for suffix in settings.suffixes:
                        path = out / f"{chosen[row].name}.{suffix}"
                        media.write_clip(path, frames, settings.fps)

            # Nothing enters the record that another process is still writing.
            finite = sampler.finite(latents)[: len(chosen)]
            _wait_for_all(f"samples/{start}")
            if first:
                records.add(zip(chosen, finite.tolist(), strict=True), settings.suffixes)
            for bad in np.flatnonzero(~finite):
                progress.note(f"warning: {chosen[bad].name} has values that are not finite")
            progress.update(len(chosen))


class _Batches:
    """Prompt batches of one size from a cache; each process reads the rows of its devices.

    Args:
      cache: the embeddings.
      max_text_tokens: static text length; 0, or too short, takes the cache's bucket.
      size: samples in a batch.
      mesh: whose batch axes divide it.
    """

    def __init__(
        self,
        cache: embedding_cache.EmbeddingCache,
        max_text_tokens: int,
        size: int,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self.size, self._cache = size, cache
        wanted = max_text_tokens if max_text_tokens >= cache.max_length else None
        self._length, self._byt5_length = cache.lengths(wanted)

        # The rows that devices of this process hold: only their embeddings are read.
        here = sharding.batch_sharding(mesh).addressable_devices_indices_map((size,))
        self._mine = {row for (part,) in here.values() for row in range(*part.indices(size))}
        self.negative = self._pad([cache.negative])

    def read(self, rows: Sequence[outputs.Sample]) -> conditions.PromptBatch:
        """The embeddings of a batch; rows of other processes hold a prompt of this one."""
        entries = {row: self._cache[rows[row].prompt] for row in sorted(self._mine)}
        stand_in = next(iter(entries.values()))
        return self._pad([entries.get(row, stand_in) for row in range(self.size)])

    def _pad(self, entries: Sequence[embedding_cache.Entry]) -> conditions.PromptBatch:
        # With the width given, batches without quoted text have the same structure.
        padded = embedding_cache.pad_entries(
            entries, self._length, self._byt5_length, self._cache.byt5_dim
        )
        return next(conditions.batches(iter([padded])))


def _with_clip(config: schema.Config, settings: settings_lib.Settings) -> schema.Config:
    """The recipe with the clip of the settings, which a cache of images has to fit."""
    clip = {name: getattr(settings, name) for name in ("frames", "height", "width", "fps")}
    return dataclasses.replace(config, video=dataclasses.replace(config.video, **clip))


def _read_networks(config: schema.Config, source: sources.Source) -> networks_lib.Networks:
    try:
        return networks_lib.read_networks(config.model)
    except ValueError as error:
        # The field that the flag stands in for.
        flag = "--weights" if source.weights else "config.model.transformer"
        raise ValueError(str(error).replace("config.model.transformer", flag)) from error


def _open_prompts(
    config: schema.Config, request: Request, networks: networks_lib.Networks
) -> embedding_cache.EmbeddingCache:
    """The cache that --prompts names, or the word embeddings of its prompts."""
    # A recipe marks a cache by a prefix; here a folder is one.
    source = request.prompts
    if pathlib.Path(source).is_dir():
        source = f"{prompts_lib.CACHE}{source}"
    data = dataclasses.replace(config.data, eval_prompts=source)
    try:
        return prompts_lib.open_cache(
            dataclasses.replace(config, data=data), "eval_prompts", request.out, networks
        )
    except ValueError as error:
        raise ValueError(str(error).replace("config.data.eval_prompts", "--prompts")) from error


def _note_incomplete(config: schema.Config, request: Request, texts: Sequence[str]) -> None:
    """Says which prompts are less than the captions that the small model was trained on."""
    if config.data.text_encoder != "words" or jax.process_index():
        return
    if found := captions.incomplete(texts):
        print(
            f"note: --prompts: {len(found)} of {len(texts)} prompts are no whole captions, such as "
            f"{found[0]!r}; the small model knows those like {spec.example_caption()!r}",
            file=sys.stderr,
        )


def _check_batch_size(size: int | None, mesh: jax.sharding.Mesh) -> None:
    shards = mesh_lib.batch_shards(mesh)
    if size is not None and (size < 1 or size % shards):
        raise ValueError(
            f"--batch_size: got {size}; allowed: a multiple of the {shards} parts (data × fsdp) "
            "that the mesh cuts a batch into"
        )


def _default_batch_size(count: int, config: schema.Config, mesh: jax.sharding.Mesh) -> int:
    """What is decoded at a time, but not more than there is to do; a multiple of the shards."""
    shards = mesh_lib.batch_shards(mesh)
    wanted = min(count, max(config.rollout.decode_batch, shards))
    return -(-wanted // shards) * shards


def _decode_batch(size: int, config: schema.Config, mesh: jax.sharding.Mesh) -> int:
    """The largest part of a batch that divides it, divides over the mesh and is not too large."""
    # In clips of a device, so that every part is spread over all of them.
    shards = mesh_lib.batch_shards(mesh)
    per_shard = size // shards
    most = max(1, config.rollout.decode_batch // shards)
    return shards * max(n for n in range(1, min(most, per_shard) + 1) if per_shard % n == 0)


def _unfinished(
    plan: Sequence[outputs.Sample], records: outputs.Records, suffixes: Sequence[str]
) -> list[outputs.Sample]:
    """What is left to do, the same list on every process (process 0 has the record)."""
    # With lists that differ, processes would wait for each other for ever.
    done = np.array([records.finished(sample, suffixes) for sample in plan])
    if jax.process_count() > 1:
        done = np.asarray(multihost_utils.broadcast_one_to_all(done))
    return [sample for sample, is_done in zip(plan, done, strict=True) if not is_done]


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
