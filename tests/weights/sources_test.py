"""Sources of parameters against numpy: slices, merged adapters, refusals, what devices read."""

import itertools

import jax
import numpy as np
import pytest
import safetensors.numpy

from sage_grpo_jax.weights import sources
from sage_grpo_jax.weights.formats import tensor_files
from sage_grpo_jax.weights.formats.source import Source
from sage_grpo_jax.weights.tables.key_table import Row

KERNEL, SCALE = ("blocks", "query", "kernel"), ("norm", "scale")
ROWS = [Row(KERNEL, "l.{i}.q.weight", "linear", 3), Row(SCALE, "norm.gamma", "scale3d")]
SHAPES = {KERNEL: (3, 4, 6), SCALE: (5,)}


class Recorder(Source):
    """Arrays as a source that remembers what was read of it."""

    def __init__(self, **values):
        self.values = {tuple(name.split("__")): value for name, value in values.items()}
        self.shapes = {path: value.shape for path, value in self.values.items()}
        self.reads = []

    def read(self, path, index):
        self.reads.append((path, index))
        return self.values[path][index]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def every_index(shape):
    """Whole axes, and parts of them."""
    return itertools.product(*[(slice(None), slice(1, size)) for size in shape])


@pytest.fixture
def tensors(tmp_path):
    values = {f"l.{i}.q.weight": draw(6, 4, seed=i) for i in range(3)}
    values["norm.gamma"] = draw(5, 1, 1, 1, seed=3)
    safetensors.numpy.save_file(values, tmp_path / "m.safetensors")
    return values, tensor_files.open_tensors(tmp_path / "m.safetensors")


def test_tensors_are_stacked_and_transposed_whatever_slice_is_read(tensors):
    values, stored = tensors
    source = sources.TensorSource(ROWS, SHAPES, stored)
    want = {
        KERNEL: np.stack([values[f"l.{i}.q.weight"].T for i in range(3)]),
        SCALE: values["norm.gamma"].reshape(5),
    }
    for path, whole in want.items():
        for index in every_index(whole.shape):
            np.testing.assert_array_equal(source.read(path, index), whole[index])
    assert source.describe(KERNEL, 2) == "l.2.q.weight"
    assert source.describe(SCALE, None) == "norm.gamma"


def test_tensors_that_are_no_parameters(tensors, tmp_path):
    values, stored = tensors
    with pytest.raises(ValueError, match=r"missing: norm\.gamma"):
        sources.TensorSource(ROWS, SHAPES, {n: t for n, t in stored.items() if "norm" not in n})
    whole = values | {"norm.gamma": np.ones((5, 1, 1, 1), np.int32)}
    safetensors.numpy.save_file(whole, tmp_path / "int.safetensors")
    stored = tensor_files.open_tensors(tmp_path / "int.safetensors")
    with pytest.raises(ValueError, match=r"dtypes must be one of .*: norm\.gamma is int32"):
        sources.TensorSource(ROWS, SHAPES, stored)


def test_trees_are_read_as_they_are():
    tree = {"blocks": {"a": jax.numpy.asarray(draw(2, 3))}, "b": draw(4)}
    source = sources.TreeSource(tree)
    assert source.shapes == {("blocks", "a"): (2, 3), ("b",): (4,)}
    for path, value in ((("blocks", "a"), tree["blocks"]["a"]), (("b",), tree["b"])):
        for index in every_index(value.shape):
            np.testing.assert_array_equal(source.read(path, index), value[index])


def test_adapters_are_added_where_there_are_some():
    base = Recorder(blocks__q__kernel=draw(3, 4, 6), blocks__q__bias=draw(3, 6), out=draw(2))
    down, up = draw(3, 4, 2, seed=1), draw(3, 2, 6, seed=2)
    adapters = Recorder(blocks__q__down=down, blocks__q__up=up)
    source = sources.MergedSource(base, adapters, scale=1.5)
    kernel, bias = ("blocks", "q", "kernel"), ("blocks", "q", "bias")
    product = np.einsum("bir,bro->bio", down.astype(np.float64), up.astype(np.float64))
    want = base.values[kernel] + 1.5 * product
    for index in every_index(want.shape):
        np.testing.assert_allclose(source.read(kernel, index), want[index], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(source.read(bias, (slice(1, 3),)), base.values[bias][1:3])
    np.testing.assert_array_equal(source.read(("out",), (slice(None),)), base.values["out",])


@pytest.mark.parametrize(
    "changes",
    [{"down": (3, 5, 2)}, {"up": (3, 2, 5)}, {"up": (2, 2, 6)}, {"name": "k"}],
)
def test_adapters_of_another_model(changes):
    shapes = {"down": (3, 4, 2), "up": (3, 2, 6), "name": "q"} | changes
    name = shapes.pop("name")
    adapters = Recorder(**{f"blocks__{name}__{part}": draw(*s) for part, s in shapes.items()})
    base = Recorder(blocks__q__kernel=draw(3, 4, 6))
    with pytest.raises(ValueError, match=rf"adapter blocks/{name}/.* does not fit the base"):
        sources.MergedSource(base, adapters, 1.0)


def test_what_is_not_finite_is_named():
    values = draw(3, 4)
    values[1, 2] = np.nan
    source = sources.FiniteSource(Recorder(blocks__bias=values), "the file")
    path = ("blocks", "bias")
    np.testing.assert_array_equal(source.read(path, (slice(2, 3), slice(None))), values[2:])
    message = "the file: tensor blocks/bias, layer 1 holds NaN or infinite values"
    with pytest.raises(ValueError, match=message):
        source.read(path, (slice(1, 2), slice(None)))


def test_devices_read_their_slices_and_share_them():
    """Four devices, two slices of each parameter: each is read once, layer by layer."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    source = Recorder(blocks__q=draw(3, 4, 6), out=draw(4, 2))
    shardings = {"blocks": {"q": jax.NamedSharding(mesh, jax.P(None, "a"))},
                 "out": jax.NamedSharding(mesh, jax.P("b"))}  # fmt: skip
    found = sources.to_devices(source, shardings, np.float32)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
    np.testing.assert_array_equal(found["blocks"]["q"], source.values["blocks", "q"])
    np.testing.assert_array_equal(found["out"], source.values["out",])
    sizes = [source.values[path][index].size for path, index in source.reads]
    assert sorted(sizes) == [4, 4, *[2 * 6] * 6]

    plain = sources.to_devices(source, None, jax.numpy.bfloat16)
    want = source.values["out",].astype(jax.numpy.bfloat16)
    np.testing.assert_array_equal(plain["out"], want)
