"""What weight tables are made with: counting layers of damaged checkpoints, and refusals."""

import pytest

from sage_grpo_jax.weights.tables import model_tables
from sage_grpo_jax.weights.tables.model_tables import Fact

PARTS = ["b.{i}.q.weight", "b.{i}.q.bias", "b.{i}.norm", "b.{i}.k"]


def layers(*numbers, without=()):
    names = [part.format(i=i) for part in PARTS for i in numbers]
    return {name: (1,) for name in names if name not in without}


def test_layers_are_counted():
    others = {"b.x.q.weight": (1,), "c.7.q.weight": (1,), "b.5.other": (1,), "ab.9.k": (1,)}
    for count in (0, 1, 3, 12):
        assert model_tables.count_layers(PARTS, layers(*range(count)) | others) == count


def test_a_layer_is_there_if_half_of_it_is():
    half = layers(0, 1, 2, without=("b.2.q.weight", "b.2.k"))
    assert model_tables.count_layers(PARTS, half) == 3
    less = layers(0, 1, 2, without=("b.2.q.weight", "b.2.k", "b.2.norm"))
    assert model_tables.count_layers(PARTS, less) == 2


def test_layers_that_are_missing_between_others_make_no_count():
    for tensors in (layers(0, 2), layers(1, 2), layers(1)):
        with pytest.raises(ValueError, match="layers are missing between others"):
            model_tables.count_layers(PARTS, tensors)


def test_a_part_is_there_if_half_of_it_is():
    names = ["a.weight", "a.bias", "b.{i}.k"]
    assert model_tables.has_part(names, {"a.weight": (1,), "b.0.k": (1,)})
    assert not model_tables.has_part(names, {"a.bias": (1,), "b.1.k": (1,)})
    assert not model_tables.has_part(names, {})


def test_a_field_that_is_known_for_the_released_width_only():
    model_tables.require_released("heads", None, 8)
    model_tables.require_released("heads", Fact(8, "x.weight"), 8)
    message = r"heads is not in the tensors, .* width 8, not for 9 \(x\.weight\); give --conf"
    with pytest.raises(ValueError, match=message):
        model_tables.require_released("heads", Fact(9, "x.weight"), 8)


def test_unknown_fields_are_listed():
    model_tables.refuse_unknown({"_class_name": "X", "width": 3}, ["width", "depth"])
    with pytest.raises(ValueError, match=r"fields=\['a', 'c'\]: must be only \['depth', 'width'\]"):
        model_tables.refuse_unknown({"c": 1, "width": 3, "a": 2}, ["width", "depth"])
