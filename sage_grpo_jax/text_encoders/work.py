"""Finished batches on disk, so that an encoding that was killed goes on where it was."""

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sage_grpo_jax.common import checked_json, files, folders
from sage_grpo_jax.common.progress import Progress
from sage_grpo_jax.data.embedding_records import DTYPES

SETTINGS = "settings.json"
_BATCHES = f"[a-z]*-{'[0-9]' * 6}.npz"


class WorkFolder:
    """The batches that are finished, each a file that appears whole.

    The folder belongs to one set of settings: everything that the results depend on; to which one,
    the first finished batch decides.

    Args:
      resume: continue in a folder that is there; otherwise it is emptied.

    Raises:
      ValueError: the folder has batches of other settings (the fields that differ are named), or
        files of these names that are not ours.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any], resume: bool) -> None:
        # The folder: only one that is empty, new, or ours from before.
        self.path = path
        settings = self.comparable(settings)
        if path.exists() and any(path.iterdir()) and not (path / SETTINGS).exists():
            raise ValueError(f"{path} is needed for unfinished work, but holds something else")
        folders.claim(
            path,
            (SETTINGS, _BATCHES),
            "unfinished embeddings",
            "out",
            is_ours=lambda: read_settings(path).keys() >= {"prompts", "images", "encoder"},
        )

        # Starting over removes our files alone, and takes the names again.
        if not resume:
            folders.remove_claimed(path)
            folders.claim(path, (SETTINGS, _BATCHES), "unfinished embeddings", "out")

        # Finished batches bind the folder to their settings; without any, these take over.
        file = path / SETTINGS
        if any(path.glob("*.npz")):
            before = read_settings(path)
            differ = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            if differ:
                raise ValueError(
                    f"{path} was begun with other values of {', '.join(differ)}; repeat that "
                    "command, or pass --noresume to start over"
                )
            return
        files.write_atomically(file, json.dumps(settings, indent=2).encode())

    @staticmethod
    def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as they are read back."""
        return json.loads(json.dumps(dict(settings)))

    def _file(self, stage: str, batch: int) -> pathlib.Path:
        return self.path / f"{stage}-{batch:06d}.npz"

    def has(self, stage: str, batch: int) -> bool:
        """Whether a batch is finished."""
        return self._file(stage, batch).exists()

    def write(self, stage: str, batch: int, arrays: Mapping[int, np.ndarray]) -> None:
        """Stores the arrays of a batch, by the position of their prompts."""
        # Raw bits: NumPy's files do not know bfloat16.
        bits = {str(k): a.view(f"u{a.itemsize}") for k, a in arrays.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **bits)
        files.write_atomically(self._file(stage, batch), buffer.getvalue())

    def read(self, stage: str, batch: int, position: int, dtype: str) -> np.ndarray:
        """One array of a finished batch."""
        file = self._file(stage, batch)
        try:
            with np.load(file) as arrays:
                return arrays[str(position)].view(DTYPES[dtype])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it and run again") from error

    def remove(self) -> list[str]:
        """Deletes the work, and the folder if it holds nothing else; returns what else it holds."""
        return folders.remove_claimed(self.path)


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The settings that a work folder belongs to."""
    try:
        return checked_json.load(path / SETTINGS)
    except ValueError as error:
        raise ValueError(f"{error}; pass --noresume") from error


@dataclasses.dataclass(frozen=True)
class Stage:
    """One encoder's work.

    Attributes:
      name: of its files.
      unit: what `cost` counts, in the plural: "tokens".
      inputs: what to encode, by the position of the prompt in the file.
      cost: units of an input.
      open: loads the encoder, a function from a batch of inputs to their arrays.
      dtype: what the arrays are stored in.
    """

    name: str
    unit: str
    inputs: Mapping[int, Any]
    cost: Callable[[Any], int]
    open: Callable[[], Callable[[Sequence[Any]], list[np.ndarray]]]
    dtype: str


def run(stage: Stage, work: WorkFolder, batch_size: int) -> dict[int, int]:
    """Encodes what is not finished yet; the encoder is loaded only if something is left.

    Batches are of inputs of about equal cost, the dearest first: memory runs out at once or never.
    They depend on the inputs only, so that a resumed run computes the same values.

    Returns:
      The number of the batch of every position.
    """
    # Equal costs go by position, so that a rerun cuts the same batches.
    costs = {position: stage.cost(value) for position, value in stage.inputs.items()}
    order = sorted(costs, key=lambda position: (-costs[position], position))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    pending = [number for number in range(len(batches)) if not work.has(stage.name, number)]
    if pending:
        _encode(stage, work, {number: batches[number] for number in pending}, costs)
    return {position: number for number, batch in enumerate(batches) for position in batch}


def _encode(
    stage: Stage, work: WorkFolder, pending: Mapping[int, list[int]], costs: Mapping[int, int]
) -> None:
    encode = stage.open()
    # Progress is of what is left, as speed and time are.
    total = sum(costs[position] for batch in pending.values() for position in batch)
    with Progress(total, stage.unit) as progress:
        if total < sum(costs.values()):
            progress.note(f"done before: {sum(costs.values()) - total} {stage.unit}")
        for number, positions in pending.items():
            # A batch is a file of its own: a kill loses no more than one.
            results = encode([stage.inputs[position] for position in positions])
            stored = [np.ascontiguousarray(r.astype(DTYPES[stage.dtype])) for r in results]
            work.write(stage.name, number, dict(zip(positions, stored, strict=True)))
            progress.update(sum(costs[position] for position in positions))
