"""Rules beside the fields of dataclasses: what they say, what they let through, what is built."""

import dataclasses
import math
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_grpo_jax.common import fields
from sage_grpo_jax.common.frozen_dict import FrozenDict


@dataclasses.dataclass(frozen=True)
class Inner:
    """A class that asks something of two fields, as those of the package do."""

    low: float = fields.bounded(0.0, least=0)
    high: float = fields.bounded(1.0)
    broken: bool = False

    def __post_init__(self):
        fields.check(self)
        fields.require(self.low <= self.high, self, "high", f"at least low={self.low}")
        if self.broken:
            raise ValueError("broken, whatever the fields are")


@dataclasses.dataclass(frozen=True)
class Outer:
    """One field of every sort."""

    count: int = fields.bounded(least=1)
    rate: float = fields.bounded(0.5, above=0, most=1, unless="inner.broken")
    kind: str = fields.choice("a", lambda: ("a", "b", ""))
    label: str = fields.not_empty("x", "a label")
    note: str = fields.free("", "a comment")
    steps: tuple[int, ...] = fields.bounded((1,), least=1, most=9)
    weights: FrozenDict[str, float] = fields.bounded(FrozenDict(z=1.0, a=2.0), below=5)
    inner: Inner = dataclasses.field(default_factory=Inner)


def built(**changes):
    values = dataclasses.asdict(Outer(count=3))
    inner = values["inner"] | changes.pop("inner", {})
    return fields.build(Outer, values | {"inner": inner} | changes, "top")


def test_what_is_right_is_built_and_converted():
    made = built(rate=1, steps=[2, 9], weights={"b": 4, "z": 0, "a": -3}, inner={"high": 2})
    assert made == Outer(
        3, 1.0, steps=(2, 9), weights=FrozenDict(z=0.0, a=-3.0, b=4.0), inner=Inner(high=2.0)
    )
    assert [type(v) for v in (made.rate, made.weights["b"], made.inner.high)] == [float] * 3
    assert list(made.weights) == ["z", "a", "b"]  # the default's order, then by name
    hash(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "top.count: got 0; allowed: at least 1"),
        ({"count": True}, "top.count: got True (bool); allowed: int"),
        ({"count": 1.0}, "top.count: got 1.0 (float); allowed: int"),
        ({"count": None}, "top.count: got None (NoneType); allowed: int"),
        ({"count": 2**63}, f"top.count: got {2**63}; allowed: whole numbers of 64 bits"),
        ({"rate": 0}, "top.rate: got 0.0; allowed: 0 to 1, but greater than 0"),
        ({"rate": -0.0}, "top.rate: got -0.0; allowed: 0 to 1, but greater than 0"),
        ({"rate": math.nan}, "top.rate: got nan; allowed: 0 to 1, but greater than 0"),
        ({"rate": False}, "top.rate: got False (bool); allowed: float"),
        ({"rate": 10**5000}, "top.rate: got an integer of 16610 bits; allowed: finite numbers"),
        ({"kind": "c"}, "top.kind: got 'c'; allowed: a, b, or ''"),
        ({"kind": True}, "top.kind: got True (bool); allowed: str"),
        ({"label": ""}, "top.label: got ''; allowed: a label"),
        ({"note": 3}, "top.note: got 3 (int); allowed: str"),
        ({"steps": ()}, "top.steps: got (); allowed: one or more, each 1 to 9"),
        ({"steps": (3, 10)}, "top.steps: got (3, 10); allowed: one or more, each 1 to 9"),
        ({"steps": (3, True)}, "top.steps: got True (bool); allowed: int"),
        ({"steps": 3}, "top.steps: got 3 (int); allowed: a tuple"),
        ({"weights": {"q": 5}}, "top.weights.q: got 5.0; allowed: below 5 and finite"),
        ({"weights": {"q": "1"}}, "top.weights.q: got '1' (str); allowed: float"),
        ({"weights": 1.0}, "top.weights: got 1.0; allowed: values by name"),
        ({"inner": {"low": -1}}, "top.inner.low: got -1.0; allowed: at least 0"),
        ({"inner": {"high": math.inf}}, "top.inner.high: got inf; allowed: finite"),
        ({"inner": {"broken": 1}}, "top.inner.broken: got 1 (int); allowed: bool"),
        ({"inner": {"low": 2.0}}, "top.inner.high: got 1.0; allowed: at least low=2.0"),
        ({"inner": {"broken": True}}, "top.inner: broken, whatever the fields are"),
        ({"inner": {"hig": 1}}, "top.inner.hig: unknown field; allowed: low, high, broken"),
        ({"steps": (0,) * 99}, f"top.steps: got ({'0, ' * 8}...); allowed: one or more, each 1 to"),
    ],
)
def test_one_line_with_path_value_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        built(**changes)


def test_a_group_has_to_be_a_group():
    values = dataclasses.asdict(Outer(count=3)) | {"inner": 3}
    with pytest.raises(ValueError, match=r"^top\.inner: got 3; allowed: a group of fields"):
        fields.build(Outer, values, "top")


def test_missing_fields():
    with pytest.raises(ValueError, match=r"^top\.inner: missing"):
        fields.build(Outer, _without("inner"), "top")
    with pytest.raises(ValueError, match=r"^top\.count: missing"):
        fields.build(Outer, {"rate": 1.0}, "top", defaults=True)
    made = fields.build(Outer, {"count": 2, "inner": {"high": 3.0}}, "top", defaults=True)
    assert made == Outer(2, inner=Inner(high=3.0))


def _without(name):
    values = dataclasses.asdict(Outer(count=3))
    del values[name]
    return values


def test_a_field_that_is_not_read_may_hold_anything():
    @dataclasses.dataclass(frozen=True)
    class Match:
        kind: str = fields.choice("", ("", "on"))

    @dataclasses.dataclass(frozen=True)
    class Group:
        eta: float = fields.bounded(0.5, most=1, unless="match.kind")
        match: Match = dataclasses.field(default_factory=Match)

    taken = fields.build(Group, {"eta": 7.0, "match": {"kind": "on"}}, "top")
    assert taken.eta == 7.0
    with pytest.raises(ValueError, match=r"^top\.eta: got 7\.0; allowed: at most 1"):
        fields.build(Group, {"eta": 7.0, "match": {"kind": ""}}, "top")


def test_a_dataclass_made_by_hand_checks_itself():
    for made, message in (
        ({"low": -1.0}, "Inner.low: got -1.0; allowed: at least 0"),
        ({"low": "a"}, "Inner.low: got 'a' (str); allowed: float"),
        ({"low": True}, "Inner.low: got True (bool); allowed: float"),
        ({"low": 1.5}, "Inner.high: got 1.0; allowed: at least low=1.5"),
        ({"broken": "no"}, "Inner.broken: got 'no' (str); allowed: bool"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Inner(**made)
    assert Inner(low=0, high=3).high == 3  # a whole number will do for a float
    with pytest.raises(ValueError, match=r"^--count: got 0; allowed: at least 1$"):
        fields.check(Outer(count=0), "--")


def test_the_error_survives_a_pickle():
    with pytest.raises(fields.FieldError) as error:
        Inner(low=-1.0)
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.field, again.value) == (str(error.value), "low", -1.0)


NUMBERS = st.none() | st.sampled_from([-2.0, -1, 0, 0.5, 1, 3])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(NUMBERS, NUMBERS, st.booleans(), st.booleans(), st.data())
def test_bounds_against_intervals(low, high, low_open, high_open, data):
    """The set of numbers is that of the interval, and the text names each of its ends."""
    names = ("above" if low_open else "least"), ("below" if high_open else "most")
    bounds = fields.Bounds(**dict(zip(names, (low, high), strict=True)))
    near = [math.nextafter(end, way) for end in (low, high) if end is not None for way in (-9, 9)]
    ends = [end for end in (low, high) if end is not None]
    value = data.draw(st.sampled_from([*near, *ends]) if ends else st.nothing() | st.floats())
    inside = math.isfinite(value)
    if low is not None:
        inside &= value > low if low_open else value >= low
    if high is not None:
        inside &= value < high if high_open else value <= high
    assert bounds.admits(value) == inside
    for end in ends:
        assert str(end) in bounds.allowed
        assert not bounds.admits(math.nan)
        assert not bounds.admits(math.inf)
        assert not bounds.admits(-math.inf)
