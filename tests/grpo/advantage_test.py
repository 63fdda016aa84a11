import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from sage_grpo_jax.grpo import advantage

EVERYONE = np.ones((3, 4), bool)


@functools.partial(jax.jit, static_argnames=("epsilon", "clip"))
def advantages(rewards, valid, epsilon=1e-4, clip=5.0):
    return advantage.group_advantages(rewards, valid, epsilon, clip)


def numpy_advantages(rewards, valid, epsilon, clip):
    """One group at a time, in float64, on the valid members only."""
    result = np.zeros(rewards.shape)
    for p in range(len(rewards)):
        members = np.asarray(rewards[p][valid[p]], np.float64)
        if len(members) >= 2 and np.ptp(members) > 0:
            scaled = (members - members.mean()) / (members.std() + epsilon)
            result[p][valid[p]] = np.clip(scaled, -clip, clip)
    return result


def test_by_hand():
    rewards = np.array([[1.0, 3.0], [2.0, 2.0]])
    got = advantage.group_advantages(rewards, np.ones((2, 2), bool), 0.0, 5.0)
    np.testing.assert_allclose(got, [[-1.0, 1.0], [0.0, 0.0]])
    got = advantage.group_advantages(rewards, np.ones((2, 2), bool), 1.0, 0.4)
    np.testing.assert_allclose(got, [[-0.4, 0.4], [0.0, 0.0]])
    got = advantage.group_advantages(rewards, np.ones((2, 2), bool), 0.0, 5.0, std_floor=4.0)
    np.testing.assert_allclose(got, [[-0.25, 0.25], [0.0, 0.0]])


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(
    rewards=hnp.arrays(np.float32, (3, 4), elements=st.integers(-64, 64).map(lambda n: n / 8)),
    valid=hnp.arrays(bool, (3, 4)),
    rubbish=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.0]),
)
def test_matches_numpy_and_ignores_invalid_entries(rewards, valid, rubbish):
    got = np.asarray(advantages(np.where(valid, rewards, np.float32(rubbish)), valid))
    np.testing.assert_allclose(got, numpy_advantages(rewards, valid, 1e-4, 5.0), rtol=2e-5)
    assert np.all(got[~valid] == 0)
    np.testing.assert_allclose(got.sum(axis=1), 0.0, atol=1e-5)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    rewards=hnp.arrays(np.float32, (3, 4), elements=st.integers(-64, 64).map(lambda n: n / 8)),
    valid=hnp.arrays(bool, (3, 4)),
    std=st.sampled_from(["group_unbiased", "global"]),
)
def test_other_deviations_match_numpy(rewards, valid, std):
    got = np.asarray(advantage.group_advantages(rewards, valid, 1e-4, 5.0, std=std))
    everything = np.asarray(rewards[valid], np.float64)
    wanted = np.zeros((3, 4))
    for p in range(3):
        members = np.asarray(rewards[p][valid[p]], np.float64)
        if len(members) >= 2 and np.ptp(members) > 0:
            scale = members.std(ddof=1) if std == "group_unbiased" else everything.std()
            scaled = (members - members.mean()) / (scale + 1e-4)
            wanted[p][valid[p]] = np.clip(scaled, -5, 5)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)


def test_a_global_deviation_keeps_groups_that_hardly_differ_small():
    rewards = np.float32([[0.0, 0.01, 0.0, 0.01], [-1.0, 1.0, -1.0, 1.0]])
    everyone = np.ones((2, 4), bool)
    small, large = np.asarray(advantage.group_advantages(rewards, everyone, 0.0, 5.0, std="global"))
    assert np.abs(small).max() == pytest.approx(0.005 / np.std(rewards), rel=1e-4)
    assert np.abs(large).max() > 100 * np.abs(small).max()
    own = advantage.group_advantages(rewards, everyone, 0.0, 5.0)
    np.testing.assert_allclose(np.abs(own), 1.0, rtol=1e-4)


def test_the_deviation_within_groups_is_averaged_over_those_that_have_one():
    rewards = np.float32([[1.0, 3.0, np.nan, 7.0], [2.0, 2.0, 2.0, 2.0], [5.0, 1.0, 9.0, 0.0]])
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    wanted = (np.std([1.0, 3.0, 7.0]) + 0.0) / 2  # the third has one member
    assert advantage.group_std(rewards, valid) == pytest.approx(wanted, rel=1e-6)
    assert np.isnan(advantage.group_std(rewards, np.zeros((3, 4), bool)))


def numpy_combined(rewards, weights, epsilon, clip, std_floor, std):
    """Of each reward by itself, one group at a time, in float64; NaN: the sample lacks it."""
    total = np.zeros((3, 4))
    for name, weight in weights.items():
        if weight == 0:
            continue
        column = np.asarray(rewards[name], np.float64)
        everything = column[np.isfinite(column)]
        for p in range(3):
            has = np.isfinite(column[p])
            members = column[p][has]
            if len(members) < 2 or np.ptp(members) == 0:
                continue
            scale = {
                "group": members.std(),
                "group_unbiased": members.std(ddof=1),
                "global": everything.std(),
            }[std]
            scaled = (members - members.mean()) / (max(scale, std_floor) + epsilon)
            total[p][has] += weight * scaled
    return np.clip(total, -clip, clip)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    values=hnp.arrays(np.float32, (3, 3, 4), elements=st.integers(-64, 64).map(lambda n: n / 8)),
    lacking=hnp.arrays(bool, (3, 3, 4)),
    weights=st.tuples(*[st.sampled_from([-0.5, 0.0, 0.25, 2.0])] * 3).filter(any),
    std=st.sampled_from(advantage.STDS),
    std_floor=st.sampled_from([0.0, 3.0]),
)
def test_advantages_of_each_reward_match_numpy(values, lacking, weights, std, std_floor):
    """Every sample may lack other rewards; units differ by a thousand."""
    scales = np.float32([1.0, 1e3, 0.1])[:, None, None]
    values = np.where(lacking, np.float32(np.nan), values * scales)
    rewards, weights = dict(zip("abc", values, strict=True)), dict(zip("abc", weights, strict=True))
    numbers = {"epsilon": 1e-3, "clip": 1.5, "std_floor": std_floor, "std": std}
    got = advantage.combined_advantages(rewards, weights, EVERYONE, combine="per_reward", **numbers)
    wanted = numpy_combined(rewards, weights, **numbers)
    np.testing.assert_allclose(got, wanted, rtol=5e-5, atol=2e-5)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    values=hnp.arrays(np.float32, (2, 3, 4), elements=st.integers(-64, 64).map(lambda n: n / 8)),
    valid=hnp.arrays(bool, (3, 4)),
    std=st.sampled_from(advantage.STDS),
)
def test_the_sum_is_that_of_what_has_a_weight(values, valid, std):
    """A reward that is monitored only has no part in it, nor in who is valid."""
    monitored = np.full((3, 4), np.nan, np.float32)
    rewards = {"a": values[0], "seen": monitored, "b": values[1]}
    weights = {"a": 2.0, "seen": 0.0, "b": -0.5}
    got = advantage.combined_advantages(rewards, weights, valid, 1e-4, 1.2, std=std)
    total = 2.0 * values[0] - 0.5 * values[1]  # exact
    wanted = advantage.group_advantages(total, valid, 1e-4, 1.2, std=std)
    np.testing.assert_array_equal(got, wanted)
    each = advantage.combined_advantages(
        rewards, weights, valid, 1e-4, 1.2, std=std, combine="per_reward"
    )
    assert np.all(np.isfinite(each))
    assert np.all(np.asarray(each)[~valid] == 0)


def test_a_reward_of_large_numbers_does_not_drown_the_others():
    """By hand: b agrees with a in nothing, and is a thousand times as large."""
    rewards = {
        "a": np.float32([[0.0, 1.0, 0.0, 1.0]]),
        "b": np.float32([[0.0, 0.0, 1000.0, 1000.0]]),
    }
    everyone = np.ones((1, 4), bool)

    def combined(combine, **weights):
        return advantage.combined_advantages(rewards, weights, everyone, 0.0, None, combine=combine)

    np.testing.assert_allclose(combined("per_reward", a=1.0, b=1.0), [[-2, 0, 0, 2]])
    np.testing.assert_allclose(combined("per_reward", a=3.0, b=1.0), [[-4, 2, -2, 4]])
    np.testing.assert_allclose(combined("per_reward", a=-1.0, b=0.0), [[1, -1, 1, -1]])
    np.testing.assert_allclose(combined("sum", a=1.0, b=1.0), [[-1, -1, 1, 1]], atol=2e-3)
    # One reward with weight 1 is the same either way.
    np.testing.assert_array_equal(combined("sum", b=1.0), combined("per_reward", b=1.0))


def test_large_offset_costs_no_digits():
    # Sixteenths are exact next to a million, the sum of four of them is not.
    rewards = np.float32([[0.0, 1.0, 3.0, 6.0]] * 3) / 16
    np.testing.assert_allclose(
        advantages(rewards + np.float32(1e6), EVERYONE), advantages(rewards, EVERYONE), rtol=1e-6
    )


def test_equal_rewards_and_lone_survivors_get_exactly_zero():
    rewards = np.float32([[0.1] * 4, [-7.7] * 4, [1, 2, 3, 4]])
    valid = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]], bool)
    np.testing.assert_array_equal(advantages(rewards, valid, epsilon=0.0), np.zeros((3, 4)))
    assert not np.any(advantages(rewards, np.zeros((3, 4), bool)))


def test_non_finite_rewards_count_as_failed():
    rewards = np.float32([[1.0, np.nan, 3.0, 4.0], [1, 2, np.inf, 4], [1, 2, 3, 4]])
    got = advantages(rewards, EVERYONE)
    np.testing.assert_array_equal(got, advantages(rewards, np.isfinite(rewards)))
    assert np.all(np.isfinite(got))


def test_gradients_are_finite_behind_the_mask():
    rewards = np.float32([[1.0, np.nan, 3.0, 4.0], [0.1] * 4, [1, 2, 3, 4]])
    valid = np.isfinite(rewards) & (np.arange(3)[:, None] < 2)
    gradient = jax.grad(lambda r: (advantages(r, valid) ** 3).sum())(rewards)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[~valid] == 0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"epsilon=-1\.0: must be >= 0"):
        advantage.group_advantages(EVERYONE, EVERYONE, -1.0, 5.0)
    with pytest.raises(ValueError, match=r"clip=0\.0: must be > 0 or None"):
        advantage.group_advantages(EVERYONE, EVERYONE, 0.0, 0.0)
    with pytest.raises(ValueError, match="std='prompt': must be one of group, group_unbiased"):
        advantage.group_advantages(EVERYONE, EVERYONE, 0.0, 5.0, std="prompt")
    with pytest.raises(AssertionError):
        advantage.group_advantages(EVERYONE, EVERYONE[:2], 0.0, 5.0)
    one = {"a": np.ones((3, 4))}
    with pytest.raises(ValueError, match="combine='mean': must be one of sum, per_reward"):
        advantage.combined_advantages(one, {"a": 1.0}, EVERYONE, 0.0, 5.0, combine="mean")
    for combine in advantage.COMBINES:
        with pytest.raises(ValueError, match=r"weights={'a': 0.0}: one must not be 0"):
            advantage.combined_advantages(one, {"a": 0.0}, EVERYONE, 0.0, 5.0, combine=combine)
        with pytest.raises(ValueError, match=r"clip=0\.0: must be > 0 or None"):
            advantage.combined_advantages(one, {"a": 1.0}, EVERYONE, 0.0, 0.0, combine=combine)
        with pytest.raises(KeyError):
            advantage.combined_advantages(one, {"b": 1.0}, EVERYONE, 0.0, 5.0, combine=combine)
