"""The record of a run: complete rows, cut back exactly, readable by TensorBoard."""

import io
import json

import numpy as np
import pytest

from sage_grpo_jax.common import progress
from sage_grpo_jax.data import media
from sage_grpo_jax.training import metrics


def _events(workdir):
    """(step, tag) of all scalars, by tensorboardX's own record format."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        for _, event in metrics._records(path.read_bytes()):
            found += [(event.step, value.tag) for value in event.summary.value]
    return found


def test_rows_are_json_and_non_finite_values_become_null(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, None)
    writer.write(0, {"eval/a": 1.5})
    writer.write(1, {"reward/overall": float("nan"), "loss/total": 2.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "eval/a": 1.5},
        {"step": 1, "reward/overall": None, "loss/total": 2.0},
    ]
    assert _events(tmp_path) == [(0, "eval/a"), (1, "loss/total")]


def test_resuming_cuts_both_records_back(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, None)
    for step in range(5):
        writer.write(step, {"a": float(step)})
    writer.close()
    # A kill leaves half a line and half a record.
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "a"')
    (event_file,) = tmp_path.glob("events.out.tfevents.*")
    event_file.write_bytes(event_file.read_bytes()[:-3])

    writer = metrics.MetricsWriter(tmp_path, 2)
    writer.write(3, {"a": 30.0})
    writer.close()
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["a"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert _events(tmp_path) == [(0, "a"), (1, "a"), (2, "a"), (3, "a")]


def test_a_new_run_starts_with_an_empty_record(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, None)
    writer.write(0, {"a": 0.0})
    writer.close()
    metrics.MetricsWriter(tmp_path, None).close()
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == []
    assert _events(tmp_path) == []


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        metrics.read_metrics(tmp_path / "metrics.jsonl")


def test_animation_reaches_tensorboard(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, None)
    gif = media.encode_gif(np.zeros((2, 8, 8, 3), np.uint8), fps=8.0)
    writer.write_animation(3, "eval/videos", gif, 8, 8)
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    images = [
        value.image.encoded_image_string
        for _, event in metrics._records(path.read_bytes())
        for value in event.summary.value
        if value.HasField("image")
    ]
    assert images == [gif]


def test_progress_writes_plain_lines_into_files():
    stream = io.StringIO()
    times = iter([100.0, 103.0, 106.0])
    progress = metrics.Progress(14, 4, stream, clock=lambda: next(times))
    values = {"reward/overall": 1.0, "reward/valid_fraction": 1.0, "time/rollout": 2.0}
    for step in (5, 6, 7):
        progress.step(step, values)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 5/14  reward +1.000  valid 100 %")
    # What the first step took is no measure of the others: it compiles.
    assert lines[0].endswith("time left after the next step")
    assert lines[1].endswith("0:24 left")  # 8 steps of 3 seconds
    assert lines[2].endswith("0:21 left")
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(75.4, "1:15"), (3599.9, "1:00:00"), (0, "0:00")])
def test_seconds_read_like_a_clock(seconds, text):
    assert progress.format_seconds(seconds) == text
