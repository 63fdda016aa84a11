"""Mesh sizes, and where parameters go."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from sage_grpo_jax.grpo import trust_region
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.parallel import hosts, mesh, sharding


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [((1, -1, 1), 8, (1, 8, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((2, 2, 2), 8, (2, 2, 2))],
)
def test_rest_of_the_devices(sizes, devices, expected):
    assert mesh.resolve_axis_sizes(sizes, devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices"), [((3, -1, 1), 8), ((2, 2, 1), 8), ((-1, -1, 1), 8), ((0, 8, 1), 8)]
)
def test_impossible_meshes_are_refused(sizes, devices):
    with pytest.raises(ValueError, match="allowed"):
        mesh.resolve_axis_sizes(sizes, devices)


def test_mesh_has_auto_axes():
    made = mesh.make_mesh(2, 2, 2)
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "context": 2}
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.batch_shards(made) == 4


def test_no_large_parameter_of_the_full_model_is_replicated():
    """On 64 chips no array over 8 MiB lies on every chip; moments and anchors follow."""
    made = jax.sharding.AbstractMesh((1, 16, 4), mesh.AXES)
    config = hunyuan_video.HunyuanVideoConfig()
    shapes = jax.eval_shape(lambda k: hunyuan_video.init_params(config, k), jax.random.key(0))
    names = hunyuan_video.partition_names(config)
    placed = sharding.parameter_shardings(made, names, shapes)
    for (path, shape), place in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(placed), strict=True
    ):
        if shape.size * 4 > 8 * 2**20:
            assert place.spec != PartitionSpec(*[None] * shape.ndim), jax.tree_util.keystr(path)
            assert np.prod(place.shard_shape(shape.shape)) * 64 == shape.size
    tx = optax.chain(optax.adamw(1e-3), trust_region.trust_region(trust_region.TrustRegionConfig()))
    state = sharding.optimizer_shardings(tx, made, shapes, placed)
    region = trust_region.find_state(state)
    assert region.anchor == placed
    assert region.previous == placed
    assert state[0][0].mu == placed
    assert region.weight.spec == PartitionSpec()


def test_an_axis_that_does_not_divide_stays_whole():
    made = mesh.make_mesh(1, 4, 2)
    shapes = {"a": jax.ShapeDtypeStruct((6, 8), np.float32), "b": np.zeros((12,))}
    names = {"a": (None, "embed"), "b": ("embed",)}
    placed = sharding.parameter_shardings(made, names, shapes)
    assert placed["a"].spec == PartitionSpec(None, ("fsdp", "context"))
    assert placed["b"].spec == PartitionSpec(("fsdp",))


def test_rows_come_once_whatever_the_mesh():
    made = mesh.make_mesh(2, 2, 2)
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = hosts.to_global(values, sharding.batch_sharding(made))
    rows = list(hosts.local_rows(placed))
    assert sorted(row for row, _ in rows) == list(range(8))
    for row, value in rows:
        np.testing.assert_array_equal(value, values[row])
    np.testing.assert_array_equal(hosts.to_host(placed), values)


def test_a_row_without_owner_is_an_error():
    with pytest.raises(RuntimeError, match=r"\[1\]"):
        hosts.gather_rows(np.zeros((2, 3)), np.array([True, False]))
