"""Full and broken disks, damaged folders, two trainers: one line, and the run goes on."""

import errno
import json
import pathlib

import jax
import numpy as np
import pytest
import small_policy

from sage_grpo_jax.common import files
from sage_grpo_jax.training import checkpoint, evaluation, loop, metrics, workdir


@pytest.fixture(autouse=True)
def _parameters_of_the_dit(runs, make_config, monkeypatch):
    """Checkpoints of as many arrays as the DiT has: orbax keeps small ones inside its own files."""
    small_policy.install(monkeypatch)
    runs.make_config = make_config


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def _leftovers(folder: pathlib.Path) -> list[str]:
    """Names of files and folders that are not whole."""
    return [str(p) for p in folder.rglob("*") if "tmp" in p.name]


class FullAfter:
    """A file that takes `calls` writes and half of the next one."""

    def __init__(self, file, calls: int) -> None:
        self._file, self._left = file, calls

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._left -= 1
        if self._left < 0:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            _full()
        return self._file.write(data)


def _fill_rows(patch):
    original = metrics.MetricsWriter.__init__

    def init(self, *args):
        original(self, *args)
        self._file = FullAfter(self._file, 2)

    patch.setattr(metrics.MetricsWriter, "__init__", init)


def _fill_events(patch):
    original = metrics.EventFile.__init__

    def init(self, *args):
        original(self, *args)
        self._file = FullAfter(self._file, 2)

    patch.setattr(metrics.EventFile, "__init__", init)


def _fill_samples(patch):
    original, calls = evaluation.save_samples, []

    def save(*args):
        calls.append(args)
        return original(*args) if len(calls) < 2 else _full()

    patch.setattr(evaluation, "save_samples", save)


def _fill_checkpoints(patch):
    from orbax.checkpoint import v1 as ocp

    patch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", _full)


@pytest.mark.parametrize(
    "fill",
    [
        _fill_rows,
        pytest.param(_fill_events, marks=pytest.mark.slow),
        pytest.param(_fill_samples, marks=pytest.mark.slow),
        _fill_checkpoints,
    ],
)
def test_a_full_disk_stops_with_one_line_and_the_rerun_has_the_same_bits(
    runs, straight, tmp_path, monkeypatch, fill
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(loop.StorageError, match="No space left on device") as error:
            runs.train(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert "no checkpoint yet; the same command goes on" in str(error.value)
    assert not (folder / workdir.SUMMARY_FILE).exists()
    assert _leftovers(folder) == []
    assert runs.train(folder)["steps"] == 3
    runs.assert_same(folder, straight)


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(runs, straight, tmp_path, caplog):
    folder = tmp_path / "run"
    runs.train(folder, **{"checkpoint.every": 1})
    checkpoints = folder / checkpoint.FOLDER
    (folder / workdir.SUMMARY_FILE).unlink()
    # As a copy leaves them that was cut off: one of them empty, one without its parameters.
    for path in (checkpoints / "3").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    (checkpoints / "4").mkdir()
    (checkpoints / "5.orbax-checkpoint-tmp").mkdir()
    assert runs.train(folder)["steps"] == 3
    runs.assert_same(folder, straight)
    assert "checkpoint 3 is damaged" in caplog.text
    assert sorted(p.name for p in (folder / checkpoint.DAMAGED).iterdir()) == ["3", "4"]
    assert sorted(p.name for p in checkpoints.iterdir()) == ["2", "3"]


def _flip_a_bit(folder: pathlib.Path) -> None:
    """Changes one bit of an array on the disk such that orbax reads the checkpoint all the same."""
    from orbax.checkpoint import v1 as ocp

    def read() -> bytes:
        state = ocp.load_checkpointables(folder, {"state": None})["state"]
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))

    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole, before = path.read_bytes(), read()
    for place in range(len(whole) // 2, len(whole), 101):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            if read() != before:
                return
        except ValueError:  # it has hit a header
            continue
    raise AssertionError("orbax has noticed every flipped bit")


def test_a_flipped_bit_in_a_checkpoint_is_as_good_as_a_damaged_one(
    runs, straight, tmp_path, caplog
):
    folder = tmp_path / "run"
    runs.train(folder, **{"checkpoint.every": 1})
    checkpoints = folder / checkpoint.FOLDER
    (folder / workdir.SUMMARY_FILE).unlink()
    _flip_a_bit(checkpoints / "3")
    assert runs.train(folder)["steps"] == 3
    runs.assert_same(folder, straight)
    assert "checkpoint 3 is damaged" in caplog.text
    assert "arrays do not have their checksum, first " in caplog.text
    assert [p.name for p in (folder / checkpoint.DAMAGED).iterdir()] == ["3"]


@pytest.mark.parametrize("place", ["/proc/run", "{file}", "{file}/run"])
def test_a_workdir_that_cannot_be_written_is_named(runs, tmp_path, place):
    (tmp_path / "file").write_text("")
    place = place.format(file=tmp_path / "file")
    with pytest.raises(ValueError, match=rf"--workdir: {place} cannot be used: ") as error:
        runs.train(pathlib.Path(place))
    assert "\n" not in str(error.value)


def test_a_read_only_disk_is_named(runs, tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"--workdir: .* cannot be used: Read-only file system"):
        runs.train(tmp_path / "run")


def test_a_config_that_nothing_was_recorded_with_can_be_corrected(runs, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"config.data.train_prompts"):
        runs.train(folder, **{"data.train_prompts": "nowhere.txt"})
    workdir.claim(runs.config(), folder)
    (folder / metrics.METRICS_FILE).write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"rollout.eta \(0.5 there, 0.25 here\). Allowed"):
        workdir.claim(runs.config(**{"rollout.eta": 0.25}), folder)


def test_a_finished_run_is_left_alone_and_another_config_is_refused(runs, tmp_path, monkeypatch):
    runs.train(tmp_path, num_steps=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "open_scorer", None)  # it is not looked for
        assert runs.train(tmp_path, num_steps=1)["steps"] == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json*")} == before
    expected = r"rollout.eta \(0.5 there, 0.7 here\); seed \(0 there, 1 here\). Allowed: the same"
    with pytest.raises(ValueError, match=expected):
        runs.train(tmp_path, seed=1, num_steps=1, **{"rollout.eta": 0.7})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json*")} == before


@pytest.mark.parametrize("name", [workdir.CONFIG_FILE, workdir.SUMMARY_FILE])
@pytest.mark.parametrize("text", ["", '{"steps"', "[1]"])
def test_damaged_files_of_the_workdir_are_named(runs, tmp_path, name, text):
    workdir.claim(runs.config(), tmp_path)
    (tmp_path / metrics.METRICS_FILE).write_text('{"step": 0}\n')
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name) as error:
        runs.train(tmp_path)
    assert "allowed: " in str(error.value)


def test_a_second_trainer_is_kept_out_until_the_first_one_is_gone(tmp_path):
    # A lock belongs to the open file, so the second one stands for another process.
    with (
        workdir.locked(tmp_path),
        pytest.raises(ValueError, match="another process trains in"),
        workdir.locked(tmp_path),
    ):
        pass
    with workdir.locked(tmp_path):
        pass


def test_leftovers_of_writes_that_were_cut_off_are_removed(tmp_path):
    (tmp_path / "samples").mkdir()
    kept = [tmp_path / "config.json", tmp_path / "samples" / "step_000000.png"]
    kept.append(tmp_path / ".notes.tmp")  # not ours
    left = [files.temporary_path(path, files.TEMPORARY) for path in kept]
    for path in (*kept, *left):
        path.write_text("{}")
    workdir.remove_leftovers(tmp_path)
    assert [p.exists() for p in kept] == [True, True, True]
    assert [p.exists() for p in left] == [False, False, False]


def test_a_summary_without_rows_is_written_all_the_same(make_config):
    summary = loop.summarise([], make_config())
    assert summary["eval"] == {"first": {}, "last": {}}
    assert json.loads(json.dumps(summary))["steps"] == 0


def test_a_pipe_that_nobody_reads_does_not_stop_the_run():
    class Broken:
        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    progress = metrics.Progress(10, 0, Broken())
    progress.step(1, {})
    progress.note("text")
