"""Seconds by phase, with a clock that the test sets."""

from types import SimpleNamespace

import pytest

from sage_grpo_jax.common import phases


@pytest.fixture
def clock(monkeypatch):
    """What the timer looks at; `clock.now` is set by the test."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def test_phases_add_up_and_may_lie_in_each_other(clock):
    timer = phases.PhaseTimer()
    for seconds in (1.0, 2.5):
        with timer("decode"):
            clock.now += seconds
    with timer("reward"):
        clock.now += 1.0
        with timer("decode"):
            clock.now += 4.0
    clock.now += 10.0  # in no phase
    assert timer.seconds == {"time/decode": 7.5, "time/reward": 5.0}
    assert timer.finish() == {"time/decode": 7.5, "time/reward": 5.0, "time/step": 18.5}


def test_a_phase_that_fails_counts(clock):
    timer = phases.PhaseTimer()

    def fail():
        with timer("rollout"):
            clock.now += 3.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timer.seconds == {"time/rollout": 3.0}
