"""A dictionary that cannot change and can be hashed."""

import copy
import dataclasses
import json
import pickle

import ml_collections
import pytest

from sage_grpo_jax.common.frozen_dict import FrozenDict


def test_equal_entries_are_equal_and_hash_alike_in_any_order():
    one, other = FrozenDict(a=1.0, b=2.0), FrozenDict(b=2.0, a=1.0)
    assert one == other == {"a": 1.0, "b": 2.0}
    assert hash(one) == hash(other)
    assert list(one) != list(other)  # the order is kept all the same
    assert len({one, other, FrozenDict(a=1.0, b=3.0), FrozenDict(a=1.0)}) == 3


def test_entries_are_attributes():
    frozen = FrozenDict(a=1.0, items=2.0)
    assert frozen.a == 1.0
    assert list(frozen.items()) == [("a", 1.0), ("items", 2.0)]  # what a dict has comes first
    with pytest.raises(AttributeError, match="no 'b'; there are a, items"):
        _ = frozen.b


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.__setitem__("a", 0.0),
        lambda d: d.__delitem__("a"),
        lambda d: d.update(a=0.0),
        lambda d: d.__ior__({"a": 0.0}),
        lambda d: d.setdefault("c", 0.0),
        lambda d: d.pop("a"),
        lambda d: d.popitem(),
        lambda d: d.clear(),
        lambda d: setattr(d, "a", 0.0),
    ],
)
def test_every_change_is_refused(change):
    frozen = FrozenDict(a=1.0, b=2.0)
    with pytest.raises(TypeError, match="cannot be changed"):
        change(frozen)
    assert frozen == {"a": 1.0, "b": 2.0}


def test_it_is_copied_pickled_and_written_as_a_dict_is():
    frozen = FrozenDict(a=1.0, b=2.0)
    for same in (copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert (same, type(same), list(same)) == (frozen, FrozenDict, ["a", "b"])
    assert json.loads(json.dumps(frozen)) == {"a": 1.0, "b": 2.0}

    @dataclasses.dataclass(frozen=True)
    class Holder:
        weights: FrozenDict[str, float] = frozen

    assert hash(Holder()) == hash(Holder(FrozenDict(b=2.0, a=1.0)))
    config = ml_collections.ConfigDict(dataclasses.asdict(Holder()))
    config.weights.a = 5.0  # a ConfigDict of its own
    assert config.to_dict() == {"weights": {"a": 5.0, "b": 2.0}}
    assert frozen["a"] == 1.0
