"""Checkpoints: the only file that knows orbax.

A checkpoint holds the learner's state (parameters, optimizer, trust region, step), the position of
the data iterator, and a small record (seed, reward fingerprint, skipped updates). Orbax writes to a
temporary name and renames, so a checkpoint is there whole or not at all.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

FOLDER = "checkpoints"


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
        self._checkpointer = ocp.training.Checkpointer(
            (workdir / FOLDER).absolute(),
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
        """Starts writing in the background; the arrays are copied before this returns."""
        if self.latest_step == step:
            return
        # One save at a time: the previous one has had a whole step to finish.
        self._checkpointer.wait()
        self._checkpointer.save_checkpointables_async(
            step, {"state": state, "data": iterator, "record": record}
        )

    def restore(self, abstract_state: Any, iterator: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, on the shardings of `abstract_state`; sets `iterator` to its position.

        Returns:
          (state, record)
        """
        loaded = self._checkpointer.load_checkpointables(
            self.latest_step, {"state": abstract_state, "data": iterator, "record": None}
        )
        # Restored buffers may share memory with the reader; the update gives its own ones away.
        state = jax.tree.map(jax.numpy.copy, loaded["state"])
        return state, loaded["record"]

    def wait(self) -> None:
        """Returns when everything is on disk; raises what the background save raised."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits and releases the background threads."""
        self._checkpointer.close()


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
