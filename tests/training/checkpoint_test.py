"""Only the parameters of a run, for evaluation and sampling."""

import resource

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    assert "checkpoint 3 cannot be read" in caplog.text
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
