"""Checkpoints: the only file that knows orbax.

A checkpoint holds the learner's state (parameters, optimizer, trust region, step), the position of
the data iterator, and a small record (seed, reward fingerprint, skipped updates). Orbax writes to a
temporary name and renames, so a checkpoint is there whole or not at all. One that was damaged all
the same (by a copy that was cut off, by a broken disk) is put aside for the one before it.
"""

import logging as std_logging
import os
import pathlib
import shutil
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

FOLDER = "checkpoints"
DAMAGED = "damaged"  # where unreadable checkpoints go, beside FOLDER
_TEMPORARY = "*.orbax-checkpoint-tmp*"


class StorageError(RuntimeError):
    """The disk is full or broken; nothing half-written is left under a final name."""


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
    """The checkpoints of one run, newest kept."""

    def __init__(self, workdir: pathlib.Path, every: int, keep: int) -> None:
        """
        Args:
          workdir: the run's folder.
          every: save each time the step is a multiple of it.
          keep: how many checkpoints stay.
        """
        self._every = every
        self._folder = (workdir / FOLDER).absolute()
        self._failed = False
        _quieten_orbax()
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

        Raises:
          StorageError: this save could not begin, or the one before it did not end well.
        """
        if self.latest_step == step:
            return
        # One save at a time: the previous one has had a whole step to finish.
        self.wait()
        try:
            self._checkpointer.save_checkpointables_async(
                step, {"state": state, "data": iterator, "record": record}
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error

    def restore(self, abstract_state: Any, iterator: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, on the shardings of `abstract_state`; sets `iterator` to its position.

        Where a checkpoint cannot be read, the one before it is taken: the steps between are
        repeated with the same bits. It is moved into the folder `damaged`.

        Returns:
          (state, record)

        Raises:
          StorageError: none of them can be read.
        """
        position = iterator.get_state()
        damaged: dict[int, str] = {}
        for step in sorted((c.step for c in self._checkpointer.checkpoints), reverse=True):
            try:
                loaded = self._checkpointer.load_checkpointables(
                    step, {"state": abstract_state, "data": iterator, "record": None}
                )
            except Exception as error:  # what orbax raises depends on the file that is damaged
                if jax.process_count() > 1:
                    raise  # the others may have read theirs
                damaged[step] = f"{type(error).__name__}: {_one_line(error)}"
                iterator.set_state(position)
                continue
            self._put_aside(damaged)
            # Restored buffers may share memory with the reader; the update gives its own away.
            return jax.tree.map(jax.numpy.copy, loaded["state"]), loaded["record"]
        reasons = "; ".join(f"step {step}: {text}" for step, text in damaged.items())
        raise StorageError(
            f"{self._folder}: no checkpoint can be read ({reasons}). Allowed: put one back from a "
            "copy, or remove the folder to start again"
        )

    def _put_aside(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            target = self._folder.parent / DAMAGED / str(step)
            logging.warning(
                "checkpoint %d cannot be read and is now in %s (%s); going on from the one before",
                *(step, target, reason),
            )
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        if damaged:
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


class _Quiet(std_logging.Filter):
    """Lets the log of orbax through only where details were asked for.

    It writes the trace of each background thread; the error itself is raised by `wait`.
    """

    def filter(self, record: std_logging.LogRecord) -> bool:
        return logging.level_debug() or f"{os.sep}orbax{os.sep}" not in record.pathname


_QUIET = _Quiet()


def _quieten_orbax() -> None:
    logging.get_absl_logger().addFilter(_QUIET)  # adding it again changes nothing


def _one_line(error: Exception, length: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"{text[:length]}..."


def restore_params(path: str | pathlib.Path, abstract_params: Any) -> Any:
    """Only the parameters of a run's newest checkpoint.

    Args:
      path: the workdir of a run, or its `checkpoints` folder.
      abstract_params: ShapeDtypeStructs with shardings.

    Raises:
      FileNotFoundError: no complete checkpoint there.
    """
    path = pathlib.Path(path)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; allowed: the workdir of a run")
    with ocp.training.Checkpointer(folder.absolute()) as checkpointer:
        if checkpointer.latest is None:
            raise FileNotFoundError(f"{folder}: no complete checkpoint")
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = checkpointer.load_checkpointables(
                checkpointer.latest.step, {"state": {"params": abstract_params}}
            )
    return loaded["state"]["params"]
