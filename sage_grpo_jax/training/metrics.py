"""Where the numbers go: metrics.jsonl, TensorBoard, the terminal.

Both files can be cut back to a step, so that a run that was killed and started again leaves the
same record as one that was not.
"""

import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from absl import logging
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from sage_grpo_jax.common.files import write_atomically
from sage_grpo_jax.common.progress import format_seconds

METRICS_FILE = "metrics.jsonl"
_EVENTS = "events.out.tfevents."


def write_json(path: pathlib.Path, value: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line without its end, left by a kill, is dropped.

    Raises:
      ValueError: a complete line is not a JSON object with a step.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a row of metrics ({error})") from error
        rows.append(row)
    return rows


class MetricsWriter:
    """Writes the rows of a run; only process 0 should have one.

    Args:
      workdir: the run's folder.
      last_step: the step that the run goes on from; later rows are cut off. None: a new run.
    """

    def __init__(self, workdir: pathlib.Path, last_step: int | None) -> None:
        self._path = workdir / METRICS_FILE
        kept = -1 if last_step is None else last_step
        # Steps that are done again are written again: their old rows and events go first.
        rows = [row for row in read_metrics(self._path) if row["step"] <= kept]
        write_atomically(self._path, b"".join(_line(row) for row in rows))
        truncate_events(workdir, kept)
        self._file = self._path.open("ab")
        self._events = EventFile(workdir)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row, on disk before this returns; non-finite values become null."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        # The checkpoint of a step is written after its row: what it says is done is on record.
        os.fsync(self._file.fileno())
        self._events.write(
            step,
            [
                summary_pb2.Summary.Value(tag=name, simple_value=value)
                for name, value in values.items()
                if math.isfinite(value)
            ],
        )

    def write_animation(self, step: int, name: str, gif: bytes, height: int, width: int) -> None:
        """An animated image for TensorBoard (add_video would need moviepy and writes nothing)."""
        image = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif
        )
        self._events.write(step, [summary_pb2.Summary.Value(tag=name, image=image)])

    def close(self) -> None:
        """Closes both files; every row is in them already."""
        self._events.close()
        # What a full disk did not take is tried again by close; the failure was raised before.
        with contextlib.suppress(OSError):
            self._file.close()


class EventFile:
    """A TensorBoard event file, written at once and by nobody else.

    SummaryWriter of tensorboardX hands events to a thread: one that a full disk has ended takes
    none any more, and the training waits for it for ever.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        # TensorBoard reads files in the order of their names, and never goes back: a file of a
        # clock that was put back must still come last.
        stamps = [_stamp(path) for path in workdir.glob(f"{_EVENTS}*")]
        stamp = max([int(time.time()), *(number + 1 for number in stamps)])
        self._time = float(stamp)
        name = f"{_EVENTS}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (workdir / name).open("xb", buffering=0)
        self._append(event_pb2.Event(file_version="brain.Event:2"))

    def write(self, step: int, values: Sequence[summary_pb2.Summary.Value]) -> None:
        """One event with all values of a step."""
        self._append(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, event: event_pb2.Event) -> None:
        self._time = max(self._time, time.time())
        event.wall_time = self._time
        self._file.write(_record(event.SerializeToString()))


def _stamp(path: pathlib.Path) -> int:
    """The seconds in the name of an event file; 0 where there are none."""
    digits = path.name.removeprefix(_EVENTS).partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _record(payload: bytes) -> bytes:
    """A record of an event file: length, crc, payload, crc."""
    length = struct.pack("<Q", len(payload))
    crcs = (struct.pack("<I", masked_crc32c(data)) for data in (length, payload))
    return length + next(crcs) + payload + next(crcs)


def _line(row: Mapping[str, Any]) -> bytes:
    clean = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in row.items()
    }
    return (json.dumps(clean, allow_nan=False) + "\n").encode()


def truncate_events(workdir: pathlib.Path, last_step: int) -> None:
    """Drops TensorBoard events after `last_step`, in place, file by file."""
    for path in sorted(workdir.glob(f"{_EVENTS}*")):
        data = path.read_bytes()
        kept = b"".join(
            record
            for record, event in _records(data)
            if not event.HasField("summary") or event.step <= last_step
        )
        if last_step < 0:
            path.unlink()
        elif kept != data:
            write_atomically(path, kept)


def _records(data: bytes) -> Iterator[tuple[bytes, event_pb2.Event]]:
    """The complete, undamaged records of an event file (length, crc, payload, crc)."""
    position = 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        end = position + 12 + length + 4
        payload = data[position + 12 : end - 4]
        # A file that a kill or a full disk cut off ends in half a record.
        if end > len(data) or struct.unpack_from("<I", data, end - 4)[0] != masked_crc32c(payload):
            return
        yield data[position:end], event_pb2.Event.FromString(payload)
        position = end


class Progress:
    """A line per step: rewards, phases, time left. Rewrites one line in a terminal.

    The first step compiles and says nothing about the others: the time left is known after the
    second one.
    """

    def __init__(
        self,
        total: int,
        first: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._first = first
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._warm: float | None = None  # when the first step was finished

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Reports a finished step."""
        now = self._clock()
        left = "time left after the next step"
        if step == self._first:
            pass  # made before this start, and written now: its evaluation had been cut off
        elif self._warm is None:
            self._warm = now
        else:
            # The mean is over the steps after the first one, which compiled.
            seconds = (now - self._warm) / (step - self._first - 1)
            left = f"{format_seconds(seconds * (self._total - step))} left"

        phases = " ".join(
            f"{name} {values[f'time/{name}']:.1f}"
            for name in ("rollout", "decode", "reward", "update")
            if f"time/{name}" in values
        )

        text = (
            f"step {step}/{self._total}  reward {values.get('reward/overall', math.nan):+.3f}"
            f"  valid {100 * values.get('reward/valid_fraction', math.nan):.0f} %"
            f"  kl {values.get('kl/total', math.nan):.2e}"
            f"  grad {values.get('grad/norm', math.nan):.2e}"
            f"  [{phases} s]  {left}"
        )
        self._write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")

    def _write(self, text: str) -> None:
        # A terminal that was closed, or a pipe that nobody reads, is no reason to stop training.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def log_versions() -> None:
    """Notes the versions and devices that a run uses."""
    import jax

    devices = jax.devices()
    logging.info("jax %s on %d × %s", jax.__version__, len(devices), devices[0].device_kind)
