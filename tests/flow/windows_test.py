"""Windows of steps; the moving ones against a walk from rollout to rollout."""

import numpy as np
import pytest

from sage_grpo_jax.flow import windows

STOCHASTIC = np.array([0, 1, 1, 0, 1, 1, 0], bool)


@pytest.mark.parametrize(
    ("window", "size", "masks"),
    [
        ("all", 0, [[0, 1, 1, 0, 1, 1, 0]]),
        ("first_k", 2, [[0, 1, 1, 0, 0, 0, 0]]),
        ("random_k", 3, [[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1, 0]]),
        ("random_k", 9, [[0, 1, 1, 0, 1, 1, 0]]),
        ("progressive", 3, [[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1, 0]]),
    ],
)
def test_places_count_the_steps_that_can_inject_noise(window, size, masks):
    found = windows.places(STOCHASTIC, window, size)
    np.testing.assert_array_equal(found.masks, np.array(masks, bool))
    np.testing.assert_allclose(found.shares, 1 / len(masks))


def walk(window: str, count: int, size: int, motion: windows.Motion, rollouts: int) -> list[int]:
    """Where a window is, by moving it as MixGRPO's training state is described: one state, updated
    after every rollout."""
    starts, start, spent = [], 0, 0
    for _ in range(rollouts):
        starts.append(start)
        spent += 1
        if window == "progressive":
            stay = motion.stay
        elif window == "decay":
            share = start / count
            stay = max(int(motion.stay * (1 - share) + motion.least_stay * share), 1)
        else:
            beyond = start - motion.threshold if start > motion.threshold else 0
            stay = max(int(motion.stay * 2.718281828459045 ** (-motion.rate * beyond)), 1)
        if spent >= stay:
            spent = 0
            if start + motion.stride + size <= count:
                start += motion.stride
            elif motion.restart:
                start = 0
    return starts


@pytest.mark.parametrize("window", windows.MOVING)
@pytest.mark.parametrize(
    ("count", "size", "motion"),
    [
        (19, 4, windows.Motion(stay=7, least_stay=2, threshold=5, rate=0.3)),
        (19, 4, windows.Motion(stay=7, stride=4, least_stay=2, threshold=3, rate=0.9)),
        (10, 3, windows.Motion(stay=5, stride=2, threshold=0, restart=False)),
        (6, 6, windows.Motion(stay=3)),
        (5, 1, windows.Motion(stay=1)),
    ],
)
def test_a_moving_window_is_where_the_walk_has_brought_it(window, count, size, motion):
    walked = walk(window, count, size, motion, 160)
    found = [windows.start_at(step, window, count, size, motion) for step in range(160)]
    assert found == walked
    assert min(found) == 0
    assert max(found) <= count - size
    # In one pass every place gets the share of the rollouts that `places` says.
    masks, shares = windows.places(np.ones(count, bool), window, size, motion)
    starts = [int(np.argmax(mask)) for mask in masks]
    assert starts == sorted(set(walked))
    length = walked.index(0, walked.index(starts[-1])) if 0 in walked[-20:] else None
    if motion.restart and len(starts) > 1 and length:
        counts = [walked[:length].count(start) / length for start in starts]
        np.testing.assert_allclose(shares, counts)


def test_the_first_places_of_the_published_settings():
    """25 rollouts at a place, then a step on (MixGRPO's script); 12 steps at full length, then
    e^-0.5 less with every step (its dynamic strategy)."""
    motion = windows.Motion(stay=25, stride=1, threshold=12, rate=0.5)
    assert [windows.start_at(s, "progressive", 24, 4, motion) for s in (0, 24, 25, 499, 525)] == [
        0, 0, 1, 19, 0,
    ]  # fmt: skip
    # 13 places of 25, then 15, 9, 5, 3, 2, 1, 1, 1: 325 + 37 rollouts.
    ends = np.cumsum([25] * 13 + [15, 9, 5, 3, 2, 1, 1, 1])
    for place, end in enumerate(ends):
        assert windows.start_at(int(end) - 1, "dynamic", 24, 4, motion) == place
    assert windows.start_at(int(ends[-1]), "dynamic", 24, 4, motion) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stay": 0}, "stay: got 0; allowed: at least 1"),
        ({"stride": 0}, "stride: got 0; allowed: at least 1"),
        ({"least_stay": 0}, "least_stay: got 0; allowed: at least 1"),
        ({"least_stay": 30}, "least_stay: got 30; allowed: at most stay=25"),
        ({"threshold": -1}, "threshold: got -1; allowed: at least 0"),
        ({"rate": float("nan")}, "rate: got nan; allowed: at least 0"),
        ({"stay": 2.5}, r"stay: got 2.5 \(float\); allowed: int"),
        ({"restart": 1}, r"restart: got 1 \(int\); allowed: bool"),
    ],
)
def test_bad_motion(fields, message):
    with pytest.raises(ValueError, match=rf"^Motion\.{message}"):
        windows.Motion(**fields)


def test_unknown_windows_are_refused():
    with pytest.raises(ValueError, match="window='last_k': must be one of all, first_k"):
        windows.places(STOCHASTIC, "last_k", 2)
    with pytest.raises(ValueError, match="window='random_k': must be one of progressive"):
        windows.start_at(0, "random_k", 4, 2)
