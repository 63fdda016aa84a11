"""What is saved comes back, on one process and on several; what was damaged does not."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import types

import cluster
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax.training import checkpoint


def _save(workdir, steps: int) -> None:
    saver = checkpoint.Checkpoints(workdir, every=2, keep=2)
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    for step in range(1, steps + 1):
        next(iterator)
        state = {"params": {"w": jnp.full((3,), float(step))}, "moments": jnp.zeros(3)}
        saver.save(step, state, iterator, {"skipped": step})
    saver.wait()
    saver.close()


def test_state_iterator_and_record_come_back(tmp_path):
    _save(tmp_path, 3)
    saver = checkpoint.Checkpoints(tmp_path, every=2, keep=2)
    assert saver.latest_step == 3
    assert [saver.due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        "params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=place)},
        "moments": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=place),
    }
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    state, record = saver.restore(abstract, iterator)
    saver.close()
    np.testing.assert_array_equal(state["params"]["w"], 3.0)
    assert record == {"skipped": 3}
    assert next(iterator) == 3
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["2", "3"]


def test_parameters_alone_are_restored(tmp_path):
    _save(tmp_path, 2)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=place)}
    params = checkpoint.restore_params(tmp_path, abstract)
    np.testing.assert_array_equal(params["w"], 2.0)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        checkpoint.restore_params(tmp_path / "nothing", {})
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.restore_params(tmp_path, {})


def _restore(workdir):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    vector = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=place)
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    saver = checkpoint.Checkpoints(workdir, every=2, keep=2)
    try:
        state, _ = saver.restore({"params": {"w": vector}, "moments": vector}, iterator)
    finally:
        saver.close()
    return float(state["params"]["w"][0]), next(iterator)


def _cut(folder):
    """Half of every file, as a copy leaves it that was cut off."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_checkpoint_that_can_be_read_is_taken(tmp_path, caplog):
    _save(tmp_path, 3)
    _cut(tmp_path / checkpoint.FOLDER / "3")
    # The iterator too is the one of step 2.
    assert _restore(tmp_path) == (2.0, 2)
    assert "checkpoint 3 is damaged" in caplog.text
    assert (tmp_path / checkpoint.DAMAGED / "3").is_dir()


def test_no_readable_checkpoint_is_one_line_and_touches_nothing(tmp_path):
    _save(tmp_path, 3)
    for step in ("2", "3"):
        _cut(tmp_path / checkpoint.FOLDER / step)
    with pytest.raises(
        checkpoint.StorageError, match=r"no checkpoint can be read \(step 3"
    ) as error:
        _restore(tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["2", "3"]


_PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
_ABSTRACT = {"params": {"w": jax.ShapeDtypeStruct((2, 5000), jnp.uint32, sharding=_PLACE)}}


def _save_noise(workdir, steps: int) -> list[np.ndarray]:
    """Arrays too large to lie beside the names, where the format has checksums of its own."""
    saver = checkpoint.Checkpoints(workdir, every=1, keep=9)
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    saved = []
    for step in range(1, steps + 1):
        next(iterator)
        w = jax.random.bits(jax.random.key(step), (2, 5000))
        saver.save(step, {"params": {"w": w}}, iterator, {"skipped": step})
        saved.append(np.asarray(w))
    saver.close()
    return saved


def _flip_a_bit(folder) -> None:
    """One bit of the largest file; random bits are not compressed, but stored as they are."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _restore_noise(workdir):
    saver = checkpoint.Checkpoints(workdir, every=1, keep=9)
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    try:
        state, record = saver.restore(_ABSTRACT, iterator)
    finally:
        saver.close()
    return np.asarray(state["params"]["w"]), record, next(iterator)


def test_a_flipped_bit_that_the_format_does_not_notice_is_noticed(tmp_path, caplog):
    saved = _save_noise(tmp_path, 3)
    newest = tmp_path / checkpoint.FOLDER / "3"
    _flip_a_bit(newest)
    read = ocp.load_checkpointables(newest, {"state": _ABSTRACT})["state"]["params"]["w"]
    assert (np.asarray(read) != saved[-1]).sum() == 1

    message = r"checkpoints/3: .* \(1 of 1 arrays do not have their checksum, first params/w\)"
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.restore_params(tmp_path, _ABSTRACT["params"])
    assert "\n" not in str(error.value)

    w, record, position = _restore_noise(tmp_path)
    np.testing.assert_array_equal(w, saved[1])
    assert (record, position) == ({"skipped": 2}, 2)
    assert "checkpoint 3 is damaged" in caplog.text
    assert "1 of 1 arrays do not have their checksum, first params/w" in caplog.text
    assert (tmp_path / checkpoint.DAMAGED / "3").is_dir()
    params = checkpoint.restore_params(tmp_path, _ABSTRACT["params"])
    np.testing.assert_array_equal(params["w"], saved[1])


def test_an_error_leaves_the_iterator_where_it_was(tmp_path):
    _save_noise(tmp_path, 2)
    for step in ("1", "2"):
        _flip_a_bit(tmp_path / checkpoint.FOLDER / step)
    saver = checkpoint.Checkpoints(tmp_path, every=1, keep=9)
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    with pytest.raises(checkpoint.StorageError, match=r"step 2: .* do not have their checksum"):
        saver.restore(_ABSTRACT, iterator)
    saver.close()
    assert next(iterator) == 0


def test_another_mesh_finds_the_same_checksums(tmp_path):
    (saved,) = _save_noise(tmp_path, 1)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "fsdp"))
    abstract = {"w": jax.ShapeDtypeStruct((2, 5000), jnp.uint32, sharding=place)}
    params = checkpoint.restore_params(tmp_path, abstract)
    assert params["w"].sharding == place
    np.testing.assert_array_equal(params["w"], saved)


def test_parameters_of_damaged_files_are_refused_in_one_line(tmp_path, capfd):
    """Whichever file of the state is cut: orbax itself tells of some in a hundred lines."""
    (saved,) = _save_noise(tmp_path, 1)
    folder = tmp_path / checkpoint.FOLDER / "1"
    files = [file for file in sorted((folder / "state").rglob("*")) if file.is_file()]
    refused = 0
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        capfd.readouterr()
        try:
            params = checkpoint.restore_params(tmp_path, _ABSTRACT["params"])
            np.testing.assert_array_equal(params["w"], saved)
        except ValueError as error:
            text, refused = str(error), refused + 1
            assert text.startswith(f"{folder}: the checkpoint is damaged")
            assert "\n" not in text
        assert capfd.readouterr() == ("", "")
        file.write_bytes(whole)
    assert refused >= 3


def test_parameters_of_another_shape_are_refused_in_one_line(tmp_path):
    _save_noise(tmp_path, 1)
    other = {"w": jax.ShapeDtypeStruct((4, 5000), jnp.uint32, sharding=_PLACE)}
    with pytest.raises(ValueError, match=r"checkpoints/1: .* damaged, or of another mod") as error:
        checkpoint.restore_params(tmp_path, other)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_checksums_is_accepted(tmp_path, caplog):
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    w = np.arange(10_000, dtype=np.uint32).reshape(2, 5000)
    with ocp.training.Checkpointer(tmp_path / checkpoint.FOLDER) as old:
        state = {"params": {"w": jnp.asarray(w)}}
        old.save_checkpointables(1, {"state": state, "data": iterator, "record": {"skipped": 1}})
    found, record, _ = _restore_noise(tmp_path)
    np.testing.assert_array_equal(found, w)
    assert record == {"skipped": 1}
    params = checkpoint.restore_params(tmp_path, _ABSTRACT["params"])
    np.testing.assert_array_equal(params["w"], w)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_a_damaged_checkpoint_that_cannot_be_moved_is_named(tmp_path):
    _save_noise(tmp_path, 2)
    _flip_a_bit(tmp_path / checkpoint.FOLDER / "2")
    (tmp_path / checkpoint.DAMAGED).write_text("in the way")
    with pytest.raises(checkpoint.StorageError, match=r"damaged checkpoints 2 could not be moved"):
        _restore_noise(tmp_path)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["1", "2"]


PROGRAM = """
import json, pathlib, sys
import jax
port, index, workdir, task = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
import grain, numpy as np
from sage_grpo_jax.training import checkpoint
mesh = jax.make_mesh((2,), ("fsdp",))
noise = np.random.default_rng(0).integers(0, 2**32, (2, 5000), np.uint32)

def make(step):
    values = {"w": (noise ^ np.uint32(step), "fsdp"), "step": (np.int32(step), None)}
    return {
        name: jax.make_array_from_callback(
            np.shape(value),
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[axis] if axis else [])),
            lambda index, value=value: np.asarray(value)[index],
        )
        for name, (value, axis) in values.items()
    }

iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
saver = checkpoint.Checkpoints(pathlib.Path(workdir), every=1, keep=9)
if task == "save":
    for step in (1, 2, 3, 4):
        next(iterator)
        saver.save(step, make(step), iterator, {"skipped": step})
    saver.close()
else:
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    state, record = saver.restore(jax.tree.map(like, make(0)), iterator)
    mine = np.asarray(state["w"].addressable_shards[0].data)[0]
    same = bool((mine == noise[int(index)] ^ np.uint32(state["step"])).all())
    print(json.dumps([int(state["step"]), same, record, next(iterator), saver.latest_step]))
    saver.close()
"""


def _two_processes(workdir, task: str) -> list[str]:
    """What each of them printed."""
    port = cluster.free_port()
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(index), str(workdir), task],
            cwd=pathlib.Path(__file__).parents[2],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    return outputs


@pytest.mark.slow
def test_what_one_of_two_processes_cannot_use_neither_uses(tmp_path):
    _two_processes(tmp_path, "save")
    folder = tmp_path / checkpoint.FOLDER
    # Each of these only the second process reads: it fails, or reads other arrays.
    (folder / "4" / "data" / "process_1-of-2.json").unlink()
    _flip_a_bit(folder / "3" / "state" / "ocdbt.process_1")
    _cut(folder / "2" / "state" / "ocdbt.process_1" / "d")
    outputs = _two_processes(tmp_path, "restore")
    expected = [1, True, {"skipped": 1}, 1, 1]
    assert [json.loads(text.splitlines()[-1]) for text in outputs] == [expected] * 2
    assert sorted(p.name for p in (tmp_path / checkpoint.DAMAGED).iterdir()) == ["2", "3", "4"]
    assert [p.name for p in folder.iterdir()] == ["1"]


def test_a_failed_save_is_one_line_and_leaves_no_rest(tmp_path, caplog):
    """A limit on the size of files fails in the background threads, as a full disk does."""
    _save(tmp_path, 1)
    saver = checkpoint.Checkpoints(tmp_path, every=1, keep=2)
    iterator = iter(grain.MapDataset.range(10).to_iter_dataset())
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (50_000,))}}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        saver.save(2, state, iterator, {"skipped": 0})
        with pytest.raises(checkpoint.StorageError, match="checkpoint 1 is complete") as error:
            saver.wait()
        saver.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["1"]
    assert "Traceback" not in caplog.text
    _save(tmp_path, 2)
    assert _restore(tmp_path) == (2.0, 2)


def test_reads_that_end_after_a_failure_say_nothing_and_other_errors_do(tmp_path, monkeypatch):
    """Orbax leaves at the first read that fails; the others find its event loop closed."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    (tmp_path / checkpoint.FOLDER).mkdir()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            checkpoint.restore_params(tmp_path, _ABSTRACT["params"])
    late, other = (
        types.SimpleNamespace(exc_type=type(error), exc_value=error)
        for error in (RuntimeError("Event loop is closed"), ValueError("Event loop is closed"))
    )
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert told == [other]
