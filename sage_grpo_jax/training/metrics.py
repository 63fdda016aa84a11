"""Where the numbers go: metrics.jsonl, TensorBoard, the terminal.

Both files can be cut back to a step, so that a run that was killed and started again leaves the
same record as one that was not.
"""

import json
import math
import os
import pathlib
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from sage_grpo_jax.data.media import write_atomically

METRICS_FILE = "metrics.jsonl"


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
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of metrics ({error})") from error
        rows.append(row)
    return rows


class MetricsWriter:
    """Writes the rows of a run; only process 0 should have one."""

    def __init__(self, workdir: pathlib.Path, last_step: int | None) -> None:
        """
        Args:
          workdir: the run's folder.
          last_step: the step that the run goes on from; later rows are cut off. None: a new run.
        """
        self._path = workdir / METRICS_FILE
        kept = -1 if last_step is None else last_step
        rows = [row for row in read_metrics(self._path) if row["step"] <= kept]
        write_atomically(self._path, b"".join(_line(row) for row in rows))
        truncate_events(workdir, kept)
        self._file = self._path.open("ab")
        # tensorboardX names files by the second: a quick restart would overwrite the last file.
        suffix = f".{time.time_ns()}"
        self._events = SummaryWriter(str(workdir), flush_secs=30, filename_suffix=suffix)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row, on disk before this returns; non-finite values become null."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def write_animation(self, step: int, name: str, gif: bytes, height: int, width: int) -> None:
        """An animated image for TensorBoard (add_video would need moviepy and writes nothing)."""
        image = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=gif
        )
        value = summary_pb2.Summary.Value(tag=name, image=image)
        self._events.file_writer.add_summary(summary_pb2.Summary(value=[value]), step)
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._events.close()
        self._file.close()


def _line(row: Mapping[str, Any]) -> bytes:
    clean = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in row.items()
    }
    return (json.dumps(clean, allow_nan=False) + "\n").encode()


def truncate_events(workdir: pathlib.Path, last_step: int) -> None:
    """Drops TensorBoard events after `last_step`, in place, file by file."""
    for path in sorted(workdir.glob("events.out.tfevents.*")):
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
        if end > len(data) or struct.unpack_from("<I", data, end - 4)[0] != masked_crc32c(payload):
            return
        yield data[position:end], event_pb2.Event.FromString(payload)
        position = end


class Progress:
    """A line per step: rewards, phases, time left. Rewrites one line in a terminal."""

    def __init__(self, total: int, first: int, stream=None) -> None:
        self._total = total
        self._first = first
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Reports a finished step."""
        done = step - self._first
        left = (time.monotonic() - self._start) / max(done, 1) * (self._total - step)
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
            f"  [{phases} s]  {format_seconds(left)} left"
        )
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        self._stream.flush()


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`; hours appear when there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def log_versions() -> None:
    """Notes the versions and devices that a run uses."""
    import jax

    devices = jax.devices()
    logging.info("jax %s on %d × %s", jax.__version__, len(devices), devices[0].device_kind)
