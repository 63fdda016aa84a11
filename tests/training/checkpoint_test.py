"""Only the parameters of a run, for evaluation and sampling."""

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
