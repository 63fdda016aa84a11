"""The folder of a run: which run it belongs to, who writes into it, whether the run is finished."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from sage_grpo_jax.common import files, folders
from sage_grpo_jax.config import schema
from sage_grpo_jax.data import embedding_cache
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.training import metrics

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
ENCODER_FILE = "encoder.json"
_LOCK_FILE = ".lock"
# What a run writes into its folder, and what it deletes there when it goes on.
_NAMES = (
    CONFIG_FILE,
    SUMMARY_FILE,
    ENCODER_FILE,
    metrics.METRICS_FILE,
    "transformer.json",
    "lora.json",
    "events.out.tfevents.*",
    "checkpoints/*",
    "damaged/*",
    "embeddings/*",
    "samples/*",
)

# Fields of older runs that repeated another one.
_RETIRED = ("applied_method",)
_WEIGHTS = "rewards.weights."  # the one field that is a mapping

# Fields that a rerun may change without becoming another run.
OPERATIONAL = (
    "num_steps",
    "mesh",
    "checkpoint",
    "debug",
    "rewards.spawn",
    "rewards.address",
    "rewards.timeout_seconds",
    "rewards.budget_seconds",
    "rewards.max_in_flight",
    "rewards.silence_seconds",
)


def claim(config: schema.Config, workdir: pathlib.Path) -> None:
    """Writes config.json into a `locked` folder, or checks that it belongs to the same run.

    A folder of ours in which no step was ever recorded may change its config: a mistake in the
    first one can be corrected without another folder. Fields that are younger than the folder count
    as their defaults, which leave a run as it was; those of _RETIRED are not looked at.

    Raises:
      ValueError: naming the fields that differ; a config.json or metrics.jsonl that cannot be read;
        a folder that cannot be written, or in which somebody else's files have our names.
    """
    path = workdir / CONFIG_FILE
    mine = flatten(dataclasses.asdict(config))
    with writable(workdir):
        _check_record(workdir)
        theirs = flatten(read_object(path)) if path.exists() and _has_begun(workdir) else mine

    # Fields of either that decide what the run computes
    theirs = _younger_fields(theirs) | theirs
    theirs = {name: value for name, value in theirs.items() if name not in _RETIRED}
    differing = [
        f"{name} ({theirs.get(name)!r} there, {mine.get(name)!r} here)"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
        and not any(name == o or name.startswith(f"{o}.") for o in OPERATIONAL)
    ]

    if differing:
        raise ValueError(
            f"--workdir: {workdir} belongs to a run with another config: "
            f"{'; '.join(differing)}. Allowed: the same config, or another folder"
        )
    if jax.process_index() == 0:
        # Only now is anything written but the lock: a refused command changes no file.
        make_folder(workdir, "--workdir", _NAMES, "a training run", lambda: is_config(path))
        with writable(workdir):
            metrics.write_json(path, dataclasses.asdict(config))


def claim_encoder(
    config: schema.Config, encoder: embedding_cache.Encoder, workdir: pathlib.Path
) -> None:
    """Writes encoder.json into a claimed folder, or checks that its run began with this encoder.

    Raises:
      ValueError: see `check_encoder`.
    """
    path = workdir / ENCODER_FILE
    if _has_begun(workdir) and path.exists():
        check_encoder(encoder, f"config.data.train_prompts: {config.data.train_prompts}", workdir)
    elif jax.process_index() == 0:
        with writable(workdir):
            metrics.write_json(path, dataclasses.asdict(encoder))


def check_encoder(encoder: embedding_cache.Encoder, what: str, workdir: pathlib.Path) -> None:
    """Refuses embeddings of another encoder than those of a run; one without encoder.json passes.

    Args:
      encoder: of the embeddings.
      what: the field that names them, and its value.
      workdir: of the run.

    Raises:
      ValueError: what tells the encoders apart; an encoder.json that cannot be read.
    """
    path = workdir / ENCODER_FILE
    if not path.exists():
        return
    values = read_object(path)
    try:
        first = embedding_cache.Encoder.from_dict(values)
    except ValueError as error:
        raise ValueError(
            f"--workdir: {path} is damaged ({error}); allowed: put it right, or another folder"
        ) from error
    if differing := encoder.differences(first):
        raise ValueError(
            f"{what} comes from another encoder than the embeddings that the run in {workdir} "
            f"began with: {differing}. Allowed: embeddings of the same encoder, or another folder"
        )


@contextlib.contextmanager
def writable(folder: pathlib.Path, flag: str = "--workdir") -> Iterator[None]:
    """Turns what the system says about a folder that cannot be used into one line about its flag.

    Raises:
      ValueError: instead of an OSError of the block.
      StorageError: the disk is full or broken.
    """
    try:
        yield
    except OSError as error:
        if said := files.disk_failure(error):
            raise files.StorageError(
                f"{flag}: {folder} cannot be written: {said}; the same command goes on once there "
                "is room"
            ) from error
        raise ValueError(
            f"{flag}: {folder} cannot be used: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}; allowed: a folder that can be "
            "written, on a disk with room"
        ) from error


def make_folder(
    folder: pathlib.Path,
    flag: str,
    names: Collection[str] = (),
    holds: str = "results",
    is_ours: Callable[[], bool] = lambda: False,
) -> None:
    """Makes a folder of results: one that cannot be written is refused before it is needed.

    Args:
      folder: to make, where it is not there.
      flag: that names it.
      names: what will be written into it, see `folders.claim`; on one process only.
      holds: what that is.
      is_ours: whether a folder from before there were manifests is ours.

    Raises:
      ValueError: naming the flag; one of the names is taken by something that is not ours.
    """
    with writable(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if names and jax.process_index() == 0:
            folders.claim(folder, names, holds, flag, is_ours=is_ours)


def is_config(path: pathlib.Path) -> bool:
    """Whether a file is there and is the config of a run, a pretraining or a sweep."""
    if not path.is_file():
        return False
    kinds = (
        {"model", "rollout", "rewards", "trust_region"},
        {"vae_model", "transformer", "flow"},
        {"config", "points"},  # of a sweep
    )
    return any(keys <= read_object(path).keys() for keys in kinds)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second trainer out of the folder; the system frees it, however this one ends.

    Raises:
      ValueError: a process on this machine trains in the folder.
    """
    if jax.process_index():
        yield
        return
    with writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        # The lock belongs to the open file: it ends with the process, also when that is killed. The
        # file itself stays, and means nothing by itself.
        file = (workdir / _LOCK_FILE).open("a")

    with file:
        try:
            _lock(file.fileno())
        except BlockingIOError as error:
            raise ValueError(
                f"--workdir: another process trains in {workdir}; allowed: one at a time"
            ) from error
        yield


def _lock(descriptor: int) -> None:
    try:
        import fcntl  # POSIX only
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems know no locks; they are no reason not to train.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def finished(config: schema.Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do.

    Raises:
      ValueError: summary.json cannot be read.
    """
    path = workdir / SUMMARY_FILE
    if not path.exists():
        return None
    summary = read_object(path)
    if not isinstance(summary.get("steps"), int):
        raise ValueError(f"--workdir: {path} has no steps; allowed: remove it to write it again")
    return summary if summary["steps"] >= config.num_steps else None


def describe_policy(
    config: schema.Config, networks: networks_lib.Networks, workdir: pathlib.Path
) -> None:
    """Writes transformer.json, and lora.json with adapters: all that `convert` needs to know."""
    if jax.process_index():
        return
    with writable(workdir):
        text = networks.transformer.to_json()
        files.write_atomically(workdir / "transformer.json", text.encode())
        if (adapters := config.lora.adapters) is not None:
            base = config.model.transformer
            # Whoever converts the adapters later may stand in another folder.
            if not base.startswith(networks_lib.ASSET):
                base = str(networks.transformer_path.absolute())
            metrics.write_json(
                workdir / "lora.json", {**dataclasses.asdict(adapters), "base": base}
            )


def remove_leftovers(workdir: pathlib.Path) -> None:
    """Removes what writes that were cut off left under temporary names; process 0 does it."""
    if jax.process_index() == 0:
        for folder in (workdir, workdir / "samples"):
            files.remove_leftovers(folder)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _younger_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The defaults, flat, of the fields that a flat config may lack.

    A mapping is there or not as a whole: what it does not list is no field of its run.
    """
    defaults = flatten(dataclasses.asdict(schema.Config()))
    if any(name.startswith(_WEIGHTS) for name in config):
        defaults = {n: value for n, value in defaults.items() if not n.startswith(_WEIGHTS)}
    return defaults


def _has_begun(workdir: pathlib.Path) -> bool:
    """Whether the folder holds a row of metrics or a checkpoint."""
    rows = workdir / metrics.METRICS_FILE
    checkpoints = workdir / "checkpoints"
    return (rows.exists() and rows.stat().st_size > 0) or (
        checkpoints.is_dir() and any(name.isdigit() for name in os.listdir(checkpoints))
    )


def _check_record(workdir: pathlib.Path) -> None:
    """That the run's metrics and checkpoints can be gone on with, before anything is loaded."""
    checkpoints = workdir / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ValueError(f"--workdir: {checkpoints} is a file; allowed: a folder, or nothing yet")
    try:
        metrics.read_metrics(workdir / metrics.METRICS_FILE)
    except ValueError as error:
        raise ValueError(
            f"--workdir: {error}; allowed: rows of a run, or another folder"
        ) from error


def read_object(path: pathlib.Path, flag: str = "--workdir") -> dict[str, Any]:
    """The JSON object in a file that a run wrote.

    Raises:
      ValueError: naming flag and file.
    """
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{flag}: {path} is damaged ({error}); allowed: put it right, or another folder"
        ) from error
    if not isinstance(value, dict):
        shown = f"a {type(value).__name__}"
        raise ValueError(f"{flag}: {path} holds {shown}; allowed: a JSON object")
    return value
