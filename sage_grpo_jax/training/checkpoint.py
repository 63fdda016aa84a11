"""Checkpoints: the only file that knows orbax.

A checkpoint holds the learner's state (parameters, optimizer, trust region, step), the position of
the data iterator, and a small record (seed, reward fingerprint, skipped updates, the checksum of
every array). Orbax writes to a temporary name and renames, so a checkpoint is there whole or not at
all. One that was damaged all the same (a copy that was cut off, a broken disk, bits that flipped)
is put aside for the one before it.
"""

import functools
import json
import logging as std_logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax.common import files
from sage_grpo_jax.common.files import StorageError
from sage_grpo_jax.parallel import checksums, hosts
from sage_grpo_jax.weights import sources, store
from sage_grpo_jax.weights.formats import orbax_io

FOLDER = "checkpoints"
EMA = "ema"  # name of the moving average in the state
DAMAGED = "damaged"  # where unusable checkpoints go, beside FOLDER
# In the record, as JSON: one string is one file, whatever the number of arrays. Another way to sum
# will need another name: checkpoints with checksums of an unknown kind count as without.
_CHECKSUMS = "checksums_v1"
_TEMPORARY = "*.orbax-checkpoint-tmp*"


def storage_error(
    what: str, workdir: pathlib.Path, error: Exception, latest: int | None = None
) -> StorageError:
    """What to raise where `what` in the workdir could not be written or read; one line.

    Args:
      latest: step of the newest complete checkpoint; None: there is none.
    """
    kept = "no checkpoint yet" if latest is None else f"checkpoint {latest} is complete"
    return StorageError(
        f"{what} in {workdir} could not be written or read: {_one_line(error)}. The disk may be "
        f"full or broken; {kept}; the same command goes on once there is room"
    )


class Checkpoints:
    """The checkpoints of one run, newest kept.

    Args:
      workdir: the run's folder.
      every: save each time the step is a multiple of it.
      keep: how many checkpoints stay.
    """

    def __init__(self, workdir: pathlib.Path, every: int, keep: int) -> None:
        self._every = every
        self._folder = files.real_path(workdir / FOLDER)
        self._failed = False
        _quieten_orbax()
        # When to save is decided here (`due`, and at a signal), so orbax takes every step it is
        # given. What a killed run left under temporary names is removed.
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        return step % self._every == 0

    def save(self, step: int, state: Any, iterator: Any, record: dict[str, Any]) -> None:
        """Starts writing in the background; the arrays are copied before this returns.

        Their checksums go into the record, so that `restore` notices whatever changes later.

        Raises:
          StorageError: this save could not begin, or the one before it did not end well.
        """
        if self.latest_step == step:
            return
        # One save at a time: the previous one has had a whole step to finish.
        self.wait()
        # The sums are taken from the arrays on the devices, before anything is written: they tell
        # of whatever happens on the way to the disk and on it.
        record = {**record, _CHECKSUMS: json.dumps(checksums.checksums(state))}
        try:
            self._checkpointer.save_checkpointables_async(
                step, {"state": state, "data": iterator, "record": record}
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error

    def restore(self, abstract_state: Any, iterator: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, on the shardings of `abstract_state`; sets `iterator` to its position.

        Where a checkpoint cannot be read, or its arrays do not have their checksums, the one before
        it is taken: the steps between are repeated with the same bits. It is moved into the folder
        `damaged`. With several processes, what one of them cannot use none of them uses.

        Returns:
          (state, record)

        Raises:
          StorageError: none of them can be used, or a damaged one cannot be moved.
        """
        # A reading that fails half-way may have moved the iterator: it is put back to here.
        position = iterator.get_state()
        damaged: dict[int, str] = {}
        own = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

        for step in _of_first_process(own):
            wanted = {"state": abstract_state, "data": iterator, "record": None}
            folder = self._folder / str(step)
            loaded, reason = _load(folder, functools.partial(_read, folder, wanted))
            if loaded is not None:
                self._put_aside(damaged)
                # Restored buffers may share memory with the reader; the update gives its own away.
                return jax.tree.map(jax.numpy.copy, loaded["state"]), loaded["record"]
            damaged[step] = reason
            iterator.set_state(position)

        reasons = "; ".join(f"step {step}: {text}" for step, text in damaged.items())
        raise StorageError(
            f"{self._folder}: no checkpoint can be read ({reasons}). Allowed: put one back from a "
            "copy, or remove the folder to start again"
        )

    def _put_aside(self, damaged: dict[int, str]) -> None:
        if not damaged:
            return

        target = self._folder.parent / DAMAGED
        for step, reason in damaged.items():
            logging.warning(
                "checkpoint %d is damaged and goes to %s (%s); going on from the one before",
                *(step, target / str(step), reason),
            )

        # One process moves them, on the file system that all share.
        failure = None
        if jax.process_index() == 0:
            try:
                for step in damaged:
                    _move(self._folder / str(step), target)
            except OSError as error:
                failure = error
        # The other processes wait here until the folders are moved.
        if hosts.agree(failure is not None):
            reason = _one_line(failure) if failure else "see the first process"
            raise StorageError(
                f"{self._folder}: the damaged checkpoints {', '.join(map(str, damaged))} could not "
                f"be moved to {target}: {reason}. Allowed: move or remove them by hand"
            ) from failure
        self._checkpointer.reload()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          StorageError: a save did not end well.
        """
        try:
            self._checkpointer.wait()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error

    def storage_error(self, what: str, error: Exception) -> StorageError:
        """What to raise where `what` of the run could not be written or read."""
        return storage_error(what, self._folder.parent, error, self.latest_step)

    def _failure(self, error: Exception) -> StorageError:
        self._failed = True
        self._checkpointer.reload()
        return self.storage_error("a checkpoint", error)

    def close(self) -> None:
        """Waits and releases the background threads.

        Raises:
          StorageError: a save did not end well, and nobody was told.
        """
        try:
            self._checkpointer.close()
        except (OSError, ValueError, RuntimeError) as error:
            if not self._failed:
                raise self._failure(error) from error
        finally:
            if self._failed and jax.process_index() == 0:
                # Room for whoever has to make some.
                for path in self._folder.glob(_TEMPORARY):
                    shutil.rmtree(path, ignore_errors=True)


def _of_first_process(steps: list[int]) -> list[int]:
    """The steps that process 0 sees; a shared file system may show them later to the others."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    # What is broadcast has one shape everywhere, also where another number of steps is seen.
    padded = np.resize(np.asarray([*steps, 0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(padded).tolist()


def _load(
    folder: pathlib.Path, read: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any] | None, str]:
    """(content, "") of one checkpoint, or (None, why it cannot be used): the same on all processes.

    Args:
      folder: of the checkpoint.
      read: its content, among it the state (or part of it) and the record.
    """
    content, reason = None, None
    try:
        content = read()
    except Exception as error:  # what orbax raises depends on the file that is damaged
        reason = f"{type(error).__name__}: {_one_line(error)}"
    # Before the checksums: they are computed together.
    if hosts.agree(reason is not None):
        return None, reason or "another process cannot read it"
    reason = _difference(content["record"].pop(_CHECKSUMS, None), content["state"], folder)
    if hosts.agree(reason is not None):
        return None, reason or "another process read other arrays than were saved"
    return content, ""


def _read(folder: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, without waiting for other processes.

    Orbax lets them meet before and after it reads; a process that cannot read does not come, and
    the others wait for it for five minutes. Reading itself needs nobody else: as the only active
    process, each one reads the chunks of its own devices.

    Args:
      folder: of one checkpoint.
      wanted: abstract values by name, as for `ocp.load_checkpointables`.
    """
    context = ocp.Context()
    index = multihost.process_index()
    context.multiprocessing.primary_host = index
    context.multiprocessing.active_processes = {index}
    with context:
        return ocp.load_checkpointables(folder, wanted)


def _read_part(folder: pathlib.Path, name: str, abstract: Any) -> dict[str, Any]:
    """The record of a checkpoint, and only one part of its state: {"state": {name: ..}, ..}.

    Arrays that orbax does not read: of damaged ones it tells in many lines, from several threads.

    Args:
      folder: of one checkpoint.
      name: of the part.
      abstract: nested dict of ShapeDtypeStructs with shardings, all of one dtype.
    """
    expected = traverse_util.flatten_dict(abstract)
    (dtype,) = {leaf.dtype for leaf in expected.values()}
    source = orbax_io.OrbaxSource(folder, ("state", name), dtypes=(dtype.name,))
    store.check_tree(source, {path: leaf.shape for path, leaf in expected.items()}, folder)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    part = sources.to_devices(source, shardings, dtype)
    return {"state": {name: part}, **_read(folder, {"record": None})}


def _difference(saved: str | None, tree: Any, folder: pathlib.Path) -> str | None:
    """How the checksums of a tree differ from those in a record; None: not at all.

    Args:
      saved: JSON; None: from before there were checksums, nothing is compared.
      tree: the arrays, named as they were when they were saved; some may be missing.
      folder: of the checkpoint.
    """
    if saved is None:
        logging.info("%s has no checksums: its arrays are taken as they are", folder)
        return None
    found = checksums.checksums(tree)
    try:
        expected = json.loads(saved)
    except ValueError as error:
        return f"its checksums are damaged: {_one_line(error)}"
    return checksums.difference(expected, found)


def _move(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts a checkpoint into a folder, beside those of the same step that lie there."""
    folder.mkdir(exist_ok=True)
    target, number = folder / source.name, 1
    while target.exists():
        number += 1
        target = folder / f"{source.name}.{number}"
    source.rename(target)


class _Quiet(std_logging.Filter):
    """Lets the log of orbax through only where details were asked for.

    It writes the trace of each background thread; the error itself is raised by `wait`.
    """

    def filter(self, record: std_logging.LogRecord) -> bool:
        return logging.level_debug() or f"{os.sep}orbax{os.sep}" not in record.pathname


_QUIET = _Quiet()


def _quieten_orbax() -> None:
    """Leaves of what orbax says the errors that it raises; doing it again changes nothing."""
    logging.get_absl_logger().addFilter(_QUIET)
    orbax_io.drop_closed_loops()


def _one_line(error: Exception, length: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[:length]}..."


def restore_params(path: str | pathlib.Path, abstract_params: Any, ema: bool = False) -> Any:
    """Only the parameters of a run's newest checkpoint.

    Args:
      path: the workdir of a run, or its `checkpoints` folder.
      abstract_params: ShapeDtypeStructs with shardings.
      ema: their moving average instead.

    Raises:
      FileNotFoundError: no complete checkpoint there.
      ValueError: it is damaged, or holds other parameters. No older one is taken: whoever names a
        run wants its newest policy.
    """
    path = pathlib.Path(path)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; allowed: the workdir of a run")

    # The newest one
    folder = files.real_path(folder)
    _quieten_orbax()
    with ocp.training.Checkpointer(folder) as checkpointer:
        latest = checkpointer.latest
    if latest is None:
        raise FileNotFoundError(f"{folder}: no complete checkpoint")
    folder = folder / str(latest.step)

    # The part of it that is wanted: optimizer and references, several times as large, stay on disk
    name = EMA if ema else "params"
    if ema and not _has_average(folder):
        raise ValueError(
            f"{path}: the run keeps no moving average of its parameters; allowed: the parameters "
            "themselves, or a run with config.ema.decay above 0"
        )
    content, reason = _load(folder, functools.partial(_read_part, folder, name, abstract_params))
    if content is None:
        raise ValueError(
            f"{folder}: the checkpoint is damaged, or of another model ({reason}). Allowed: a "
            "whole one; where this folder is moved away, the one before it is taken"
        )
    return content["state"][name]


def _has_average(folder: pathlib.Path) -> bool:
    """Whether a checkpoint holds a moving average; what cannot be read counts as one that may."""
    try:
        return ocp.checkpointables_metadata(folder).metadata["state"].get(EMA) is not None
    except (OSError, ValueError, KeyError):
        return True  # `_load` tells what is wrong
