"""The records of a run where clocks are put back; event files as another reader sees them."""

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from sage_grpo_jax.training import metrics


def _read(path):
    """Every event of a file: (length, crc, payload, crc), read by hand."""
    data, events = path.read_bytes(), []
    while data:
        length, crc = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:12], "little")
        payload, end = data[12 : 12 + length], data[12 + length : 16 + length]
        assert masked_crc32c(data[:8]) == crc
        assert masked_crc32c(payload) == int.from_bytes(end, "little")
        events.append(event_pb2.Event.FromString(payload))
        data = data[16 + length :]
    return events


def test_a_clock_that_is_put_back_disturbs_neither_record(tmp_path, monkeypatch):
    now = 2_000_000_000.0
    monkeypatch.setattr(metrics.time, "time", lambda: now)
    for step, jump in enumerate((0.0, 0.0, -86_400.0, -3_600.0, 7_200.0)):
        writer = metrics.MetricsWriter(tmp_path, step - 1)
        now += jump  # while it runs, and before the next one
        writer.write(step, {"a": float(step)})
        writer.close()
    steps = [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4]
    # TensorBoard reads files by name and never goes back; none has replaced another.
    files = sorted(tmp_path.glob("events.out.tfevents.*"))
    assert len(files) == 5
    events = [event for path in files for event in _read(path)]
    assert [e.step for e in events if e.HasField("summary")] == [0, 1, 2, 3, 4]
    times = [e.wall_time for e in events]
    assert times == sorted(times)


def test_event_files_hold_the_finite_values_of_a_step(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, None)
    writer.write(7, {"a": 0.5, "b": float("inf"), "c": -2.0})
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    first, second = _read(path)
    assert first.file_version == "brain.Event:2"
    assert [(v.tag, v.simple_value) for v in second.summary.value] == [("a", 0.5), ("c", -2.0)]
    assert second.step == 7
