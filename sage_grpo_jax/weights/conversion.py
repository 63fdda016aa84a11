"""Conversions between formats: open the source, check everything, then stream into the sink."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TextIO

from sage_grpo_jax.common import files, folders
from sage_grpo_jax.common.byte_progress import Progress
from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import TransformerConfig
from sage_grpo_jax.models.lora import LoraConfig
from sage_grpo_jax.weights import adapters, configs, layouts, store
from sage_grpo_jax.weights.formats import orbax_io, safetensors_io, tensor_files
from sage_grpo_jax.weights.formats.source import Source
from sage_grpo_jax.weights.layouts import Config
from sage_grpo_jax.weights.sources import FiniteSource, MergedSource

FORMATS = (*store.FORMATS, "peft")
DTYPES = ("float32", "bfloat16")
_RUN_CONFIG = "transformer.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to convert.

    Attributes:
      src: a folder or file; with `run_step`, the workdir of a training run.
      src_format: one of `FORMATS`.
      dst: the folder to write.
      dst_format: one of `FORMATS`.
      dtype: of the written weights, one of `DTYPES`.
      max_shard_size: largest file in diffusers' layout, such as "10GB".
      overwrite: an existing dst is replaced, if it was written by us and is unchanged.
      src_key: "module" or "ema", for training checkpoints that hold both, and for training runs:
        their parameters, or the moving average of them.
      config_json: a config file, where none lies beside the source.
      base: weights that adapters belong to.
      run_step: the folder of a training run's checkpoint.
      find_base: from a run's name of its base weights to their path.
    """

    src: pathlib.Path
    src_format: str
    dst: pathlib.Path
    dst_format: str
    dtype: str = "float32"
    max_shard_size: str = "10GB"
    overwrite: bool = False
    src_key: str | None = None
    config_json: pathlib.Path | None = None
    base: pathlib.Path | None = None
    run_step: pathlib.Path | None = None
    find_base: Callable[[str], pathlib.Path] = pathlib.Path

    def __post_init__(self) -> None:
        for field in ("src_format", "dst_format"):
            if getattr(self, field) not in FORMATS:
                raise ValueError(f"{field}={getattr(self, field)!r}: must be one of {FORMATS}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {DTYPES}")
        safetensors_io.parse_size(self.max_shard_size)
        if not self.src.exists():
            raise ValueError(f"src={self.src}: no such file or folder")

        # What is read has to outlive what is replaced.
        for field in ("src", "base"):
            path = getattr(self, field)
            dst = files.real_path(self.dst)
            if path is not None and files.real_path(path).is_relative_to(dst):
                raise ValueError(f"dst={self.dst}: must not be {field}, nor hold it")
        folders.check_target(self.dst, self.overwrite, "dst")


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source that is open: a whole model, or (with `lora`) adapters of one.

    Attributes:
      config: of the model.
      source: of parameters or adapters.
      lora: of the adapters, or None.
      base: what the source says its base weights are.
      note: for whoever converts it; "": none.
    """

    config: Config
    source: Source
    lora: LoraConfig | None = None
    base: str | None = None
    note: str = ""


def convert(job: Job, stream: TextIO | None = None) -> str:
    """Does it; the result appears whole or not at all.

    Args:
      job: what to convert.
      stream: for the progress, or None.

    Returns:
      What was written, in words.

    Raises:
      ValueError: whatever does not fit, before anything is written; values that are not finite.
      StorageError: a disk that is too small, before anything is written.
    """
    # What is read
    opened = _open(job)
    if job.dst_format == "peft" and opened.lora is None:
        raise ValueError("dst_format='peft': the source holds a whole model, no adapters")
    if opened.note and stream is not None:
        stream.write(f"note: {opened.note}\n")

    # Before a merge: it is told of which of the two NaN comes.
    source = FiniteSource(opened.source, _blamed(job, opened))
    if opened.lora is not None and not _keeps_adapters(job):
        opened = _merge(job, dataclasses.replace(opened, source=source))
        source = FiniteSource(opened.source, f"base with adapters {job.src}")

    # What is written
    dtype = store.DTYPES[job.dtype]
    total = store.total_bytes(source, dtype)
    folders.check_space(job.dst, total, "dst")

    progress = Progress(total, stream)
    options = {"dtype": dtype, "overwrite": job.overwrite, "progress": progress}
    try:
        if opened.lora is not None:
            adapters.write(job.dst, source, opened.lora, opened.config, job.dst_format, **options)
        else:
            limit = safetensors_io.parse_size(job.max_shard_size)
            store.write_model(
                job.dst,
                opened.config,
                source,
                job.dst_format,
                max_shard_size=limit,
                **options,
            )
    finally:
        progress.close()

    is_vae = registry.kind_of(opened.config) == registry.AUTOENCODER
    kind = "VAE" if is_vae else "transformer"
    what = kind if opened.lora is None else f"adapters of rank {opened.lora.rank}"
    return f"{what}, {job.dst_format}, {job.dtype}, {total / 1e9:.3g} GB"


def _blamed(job: Job, opened: _Opened) -> str:
    """What is named where a source holds NaN."""
    return f"{'src' if opened.lora is None else 'adapters'} {job.src}"


def _open(job: Job) -> _Opened:
    if job.src_format == "peft":
        config = _adapted_config(job)
        return _open_adapters(job.src, config)
    if job.src_format == "orbax":
        return _open_run(job) if job.run_step is not None else _open_orbax(job)
    return _Opened(*_open_tensors(job.src, job.src_format, job.src_key, job.config_json))


def _open_tensors(
    path: pathlib.Path,
    layout: str | None,
    src_key: str | None = None,
    config_json: pathlib.Path | None = None,
) -> tuple[Config, Source]:
    """A model in one of its layouts (None: recognised), with its config."""
    file = config_json or (path if path.is_dir() else path.parent) / configs.CONFIG_FILE
    if file.is_file() or config_json is not None:
        config = configs.load_config(file)
    else:
        tensors = tensor_files.open_tensors(path, src_key)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        try:
            kind = layouts.recognise(shapes)
            config = configs.infer_config(layout or (kind.layout if kind else "diffusers"), shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return config, store.open_source(path, config, layout, src_key, str(file))


def _open_orbax(job: Job) -> _Opened:
    config = configs.load_config(job.config_json or job.src)
    if (job.src / adapters.LORA_FILE).is_file():
        return _open_adapters(job.src, _transformer(config, job.src))
    return _Opened(config, store.open_source(job.src, config, "orbax"))


def _open_adapters(path: pathlib.Path, config: TransformerConfig) -> _Opened:
    opened = adapters.open_adapters(path, config)
    note = adapters.describe_untrained(path, opened) if opened.untrained else ""
    return _Opened(config, opened.source, opened.lora, note=note)


def _open_run(job: Job) -> _Opened:
    """The parameters, or the adapters, of a training run's checkpoint."""
    file = job.config_json or job.src / _RUN_CONFIG
    if not file.is_file():
        raise ValueError(f"src={job.src}: no {file.name} there; give --config_json")
    # A run writes the transformer's config without folder: load_config takes any *.json.
    config = _transformer(configs.load_config(file), file)
    source = _open_state(job)
    description = job.src / adapters.LORA_FILE
    if not description.is_file():
        store.check_tree(source, layouts.parameter_shapes(config), file)
        return _Opened(config, source)
    lora, base = adapters.read_lora_json(description)
    store.check_tree(source, adapters.adapter_shapes(config, lora), description)
    return _Opened(config, source, lora, base)


def _open_state(job: Job) -> orbax_io.OrbaxSource:
    """The parameters of a run's checkpoint, or their moving average."""
    names = {None: "params", "module": "params", "ema": "ema"}
    if job.src_key not in names:
        raise ValueError(f"src_key={job.src_key!r}: must be module or ema")
    try:
        return orbax_io.OrbaxSource(job.run_step, ("state", names[job.src_key]))
    except ValueError as error:
        if job.src_key != "ema":
            raise
        raise ValueError(
            f"src_key='ema': {job.src} keeps no moving average of its parameters ({error}); "
            "allowed: module, or a run with config.ema.decay above 0"
        ) from error


def _adapted_config(job: Job) -> TransformerConfig:
    """The config of the model that adapters of a file belong to."""
    if job.config_json is None and job.base is None:
        raise ValueError("src_format='peft': --base (or --config_json) must name the model")
    if job.config_json is not None:
        return _transformer(configs.load_config(job.config_json), job.config_json)
    return _transformer(_open_base(job, job.base)[0], job.base)


def _transformer(config: Config, where: pathlib.Path) -> TransformerConfig:
    if registry.kind_of(config) != registry.TRANSFORMER:
        raise ValueError(f"{where}: a {type(config).__name__}; adapters belong to a DiT")
    return config


def _keeps_adapters(job: Job) -> bool:
    """Adapters stay adapters on the way to peft, and to orbax where no base is named."""
    return job.dst_format == "peft" or (
        job.dst_format == "orbax" and job.base is None and job.run_step is None
    )


def _merge(job: Job, opened: _Opened) -> _Opened:
    if job.base is None and opened.base is None:
        raise ValueError(
            f"dst_format={job.dst_format!r}: --base must name the weights to merge into"
        )
    path = job.base if job.base is not None else job.find_base(opened.base)
    config, base = _open_base(job, path)
    base = FiniteSource(base, f"base {path}")
    return _Opened(config, MergedSource(base, opened.source, opened.lora.scale))


def _open_base(job: Job, path: pathlib.Path) -> tuple[Config, Source]:
    if not path.exists():
        raise ValueError(f"base={path}: no such file or folder; --base names another")
    if orbax_io.is_orbax(path):
        config = configs.load_config(path)
        return config, store.open_source(path, config, "orbax")
    return _open_tensors(path, None, job.src_key, None)
