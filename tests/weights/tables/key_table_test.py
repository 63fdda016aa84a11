"""Key tables: layouts against torch's own, and errors that name names."""

import numpy as np
import pytest
import torch

from sage_grpo_jax.weights.tables import key_table
from sage_grpo_jax.weights.tables.key_table import LAYOUTS, Row

ROWS = [
    *key_table.linear(("blocks", "in"), "layers.{i}.fc", stacked=2),
    Row(("scale",), "norm.gamma", "scale3d"),
]
PARAMETERS = {
    ("blocks", "in", "kernel"): (2, 3, 5),
    ("blocks", "in", "bias"): (2, 5),
    ("scale",): (4,),
}
TENSORS = {
    "layers.0.fc.weight": (5, 3),
    "layers.1.fc.weight": (5, 3),
    "layers.0.fc.bias": (5,),
    "layers.1.fc.bias": (5,),
    "norm.gamma": (4, 1, 1, 1),
}


def test_linear_layout_is_the_transpose_that_matmul_needs():
    layer, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    kernel = LAYOUTS["linear"].to_ours(layer.weight.detach().numpy())
    want = layer(x).detach().numpy()
    np.testing.assert_allclose(x.numpy() @ kernel + layer.bias.detach().numpy(), want, atol=1e-6)


def test_convolution_layout_is_channels_last():
    layer, x = torch.nn.Conv3d(2, 3, (1, 2, 4)), torch.randn(1, 2, 1, 2, 4)
    kernel = LAYOUTS["conv3d"].to_ours(layer.weight.detach().numpy())
    assert kernel.shape == (1, 2, 4, 2, 3)
    got = np.einsum("bcthw,thwcd->bd", x.numpy(), kernel) + layer.bias.detach().numpy()
    np.testing.assert_allclose(got, layer(x).detach().numpy()[:, :, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_invert_and_slice_alike(kind):
    layout = LAYOUTS[kind]
    here = tuple(range(2, 2 + len(layout.permutation)))
    there = layout.shape_there(here)
    theirs = np.arange(np.prod(there)).reshape(there)
    ours = layout.to_ours(theirs)
    assert ours.shape == here
    np.testing.assert_array_equal(layout.to_theirs(ours), theirs)
    index = tuple(slice(1, size) for size in here)
    np.testing.assert_array_equal(layout.to_ours(theirs[layout.index_there(index)]), ours[index])


def test_a_fitting_table_passes():
    key_table.check_parameters(ROWS, PARAMETERS)
    key_table.check_tensors(ROWS, PARAMETERS, TENSORS)


def test_all_wrong_names_are_listed():
    tensors = {**TENSORS, "extra.a": (1,), "extra.b": (1,)}
    del tensors["layers.1.fc.bias"], tensors["norm.gamma"]
    pattern = r"missing: layers\.1\.fc\.bias, norm\.gamma; unexpected: extra\.a, extra\.b"
    with pytest.raises(ValueError, match=pattern):
        key_table.check_tensors(ROWS, PARAMETERS, tensors)
    with pytest.raises(ValueError, match=r"missing: scale; unexpected: other"):
        key_table.check_parameters(ROWS, {**dict(list(PARAMETERS.items())[:2]), ("other",): (4,)})


def test_wrong_shapes_are_listed():
    tensors = {**TENSORS, "layers.1.fc.weight": (3, 5), "norm.gamma": (4,)}
    pattern = r"layers\.1\.fc\.weight: \(3, 5\) instead of \(5, 3\), norm\.gamma: \(4,\) instead"
    with pytest.raises(ValueError, match=pattern):
        key_table.check_tensors(ROWS, PARAMETERS, tensors)


def test_rows_given_twice():
    with pytest.raises(ValueError, match="named twice: scale"):
        key_table.check_parameters([*ROWS, ROWS[-1]], PARAMETERS)
    twice = [*ROWS, Row(("other",), "norm.gamma", "scale3d")]
    with pytest.raises(ValueError, match=r"named twice: norm\.gamma"):
        key_table.check_tensors(twice, {**PARAMETERS, ("other",): (4,)}, TENSORS)


def test_bad_rows():
    with pytest.raises(ValueError, match="kind='matrix'"):
        Row(("a",), "a", "matrix")
    with pytest.raises(ValueError, match="stacked=None"):
        Row(("a",), "layers.{i}.a", "vector")


FUSED = [Row(("blocks", name, "kernel"), "l.{i}.qkv", "linear", 2, (k, 3)) for k, name in
         enumerate(("query", "key", "value"))]  # fmt: skip
FUSED_PARAMETERS = {row.ours: (2, 3, 4) for row in FUSED}
FUSED_TENSORS = {"l.0.qkv": (12, 3), "l.1.qkv": (12, 3)}


def test_fused_tensors_are_used_once_by_all_of_their_parts():
    key_table.check_tensors(FUSED, FUSED_PARAMETERS, FUSED_TENSORS)
    with pytest.raises(ValueError, match=r"only the parts \[\(0, 3\), \(1, 3\)\] of l\.0\.qkv"):
        key_table.check_tensors(FUSED[:2], FUSED_PARAMETERS, FUSED_TENSORS)
    with pytest.raises(ValueError, match=r"named twice: l\.0\.qkv, l\.1\.qkv"):
        key_table.check_tensors([*FUSED, FUSED[1]], FUSED_PARAMETERS, FUSED_TENSORS)
    with pytest.raises(ValueError, match=r"l\.1\.qkv: \(4, 3\) instead of \(12, 3\)"):
        key_table.check_tensors(FUSED, FUSED_PARAMETERS, FUSED_TENSORS | {"l.1.qkv": (4, 3)})


def test_parts_and_swapped_halves_by_slices():
    fused = np.arange(36).reshape(12, 3)
    for row, want in zip(FUSED, np.split(fused, 3), strict=True):
        for here in ((slice(0, 3), slice(0, 4)), (slice(1, 2), slice(2, 4))):
            there = row.index_there(here, (3, 4))
            np.testing.assert_array_equal(row.to_ours(fused[there], here), want.T[here])
        offset, values = row.to_theirs(np.ascontiguousarray(want.T))
        np.testing.assert_array_equal(fused[offset : offset + 4], values)
    row, vector = Row(("b",), "b", "vector", swapped=True), np.arange(6)
    for here in ((slice(0, 6),), (slice(2, 4),)):
        found = row.to_ours(vector[row.index_there(here, (6,))], here)
        np.testing.assert_array_equal(found, np.array([3, 4, 5, 0, 1, 2])[here])
    offset, values = row.to_theirs(np.array([3, 4, 5, 0, 1, 2]))
    np.testing.assert_array_equal(values, vector)
    assert offset == 0


def test_bad_parts():
    with pytest.raises(ValueError, match=r"part=\(3, 3\)"):
        Row(("a",), "a", "vector", part=(3, 3))
    with pytest.raises(ValueError, match="swapped=True"):
        Row(("a",), "a", "vector", part=(0, 2), swapped=True)
