import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sage_grpo_jax.grpo import loss

B, T = 6, 5
CLIP = 0.1


@functools.partial(jax.jit, static_argnames="objective")
def value_and_grad(log_ratio, advantages, weights, mask, objective="ppo", normalizer=None):
    def fn(log_ratio):
        return loss.policy_loss(
            log_ratio,
            advantages,
            weights,
            CLIP,
            mask=mask,
            objective=objective,
            normalizer=normalizer,
        )

    return jax.value_and_grad(fn, has_aux=True)(log_ratio)


def make_inputs(seed=0, size=0.15):
    rng = np.random.default_rng(seed)
    log_ratio = rng.normal(scale=size, size=(B, T)).astype(np.float32)
    return (
        log_ratio,
        rng.normal(size=B).astype(np.float32),
        rng.uniform(0, 3, T).astype(np.float32),
        rng.random((B, T)) < 0.7,
    )


@pytest.mark.parametrize("seed", range(3))
def test_ppo_matches_torch_in_float64(seed):
    log_ratio, advantages, weights, mask = make_inputs(seed)
    leaf = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    ratio, a = torch.exp(leaf), torch.tensor(advantages, dtype=torch.float64)[:, None]
    terms = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - CLIP, 1 + CLIP))
    want = (terms * torch.tensor(weights))[torch.tensor(mask)].mean()
    want.backward()
    (value, metrics), gradient = value_and_grad(log_ratio, advantages, weights, mask)
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=2e-5, atol=1e-8)
    ratio = np.exp(np.float64(log_ratio))[mask]
    np.testing.assert_allclose(metrics["ratio/mean"], ratio.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio/max_deviation"], np.abs(ratio - 1).max(), rtol=1e-5)
    clipped = np.mean(np.abs(ratio - 1) > CLIP)
    np.testing.assert_allclose(metrics["ratio/clip_fraction"], clipped, rtol=1e-6)


def test_contract_without_keywords_is_the_mean_over_all_entries():
    log_ratio, advantages, weights, _ = make_inputs()
    value, _ = loss.policy_loss(log_ratio, advantages, weights, 100.0)
    want = -(advantages[:, None] * np.exp(log_ratio) * weights).mean()
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_objectives_have_the_same_gradient_at_ratio_one():
    _, advantages, weights, mask = make_inputs()
    ratio_one = np.zeros((B, T), np.float32)
    _, ppo = value_and_grad(ratio_one, advantages, weights, mask)
    (value, _), reinforce = value_and_grad(ratio_one, advantages, weights, mask, "reinforce")
    want = np.where(mask, -advantages[:, None] * weights, 0) / mask.sum()
    np.testing.assert_allclose(ppo, want, rtol=1e-6)
    np.testing.assert_allclose(reinforce, want, rtol=1e-6)
    assert value == 0


def test_tiny_clip_ranges_are_exact():
    """At 1e-6 the ratio itself has only four steps of float32 between 1 and the clip."""
    deviations = np.array([[0.9e-6, 1.1e-6, -0.9e-6, -1.1e-6]])
    log_ratio = np.log1p(deviations).astype(np.float32)

    def fn(log_ratio, sign):
        return loss.policy_loss(log_ratio, sign * jnp.ones(1), jnp.ones(4), 1e-6)[0]

    gradient = jax.jit(jax.grad(fn))
    up, down = (gradient(log_ratio, sign)[0] != 0 for sign in (1.0, -1.0))
    np.testing.assert_array_equal(up, [True, False, True, True])
    np.testing.assert_array_equal(down, [True, True, True, False])


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_micro_batches_add_up_to_the_whole(objective):
    log_ratio, advantages, weights, mask = make_inputs()
    count = mask.sum()
    (want, want_metrics), want_gradient = value_and_grad(
        log_ratio, advantages, weights, mask, objective
    )
    total, metrics, gradients = 0.0, None, []
    for i in range(0, B, 2):
        rows = slice(i, i + 2)
        (value, part), gradient = value_and_grad(
            log_ratio[rows], advantages[rows], weights, mask[rows], objective, count
        )
        total += value
        metrics = part if metrics is None else loss.accumulate_metrics(metrics, part)
        gradients.append(gradient)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(gradients), want_gradient, rtol=1e-6)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, want_metrics[name], rtol=1e-6)


def test_weights_may_differ_by_sample():
    """Micro-batches of (sample, step) pairs: one column, each row with the weight of its step."""
    log_ratio, advantages, weights, mask = make_inputs()
    (want, _), _ = value_and_grad(log_ratio, advantages, weights, mask)
    (got, _), _ = value_and_grad(
        log_ratio.reshape(-1, 1),
        np.repeat(advantages, T),
        np.tile(weights, B).reshape(-1, 1),
        mask.reshape(-1, 1),
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10),
    rubbish=st.sampled_from([np.nan, np.inf, -np.inf]),
    objective=st.sampled_from(loss.OBJECTIVES),
)
def test_nothing_leaks_from_behind_the_mask(seed, rubbish, objective):
    log_ratio, advantages, weights, mask = make_inputs(seed)
    mask[0] = False
    clean = value_and_grad(log_ratio, advantages, weights, mask, objective)
    log_ratio, advantages = np.where(mask, log_ratio, np.float32(rubbish)), advantages.copy()
    advantages[0] = rubbish
    dirty = value_and_grad(log_ratio, advantages, weights, mask, objective)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_nothing_leaks_operation_by_operation():
    """XLA makes a choice of a product with a mask; without it 0·NaN is NaN."""
    log_ratio, advantages, weights, mask = make_inputs()
    broken = np.where(mask, log_ratio, np.float32(np.nan))
    with jax.disable_jit():
        clean, _ = loss.policy_loss(log_ratio, advantages, weights, CLIP, mask=mask)
        dirty, metrics = loss.policy_loss(broken, advantages, weights, CLIP, mask=mask)
    assert dirty == clean
    assert all(np.isfinite(value) for value in metrics.values())


def test_empty_mask_and_huge_ratios_stay_finite():
    log_ratio, advantages, weights, mask = make_inputs()
    outputs = value_and_grad(log_ratio, advantages, weights, np.zeros_like(mask))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(outputs))
    advantages[0] = 0.0
    outputs = value_and_grad(np.sign(log_ratio) * 1e4, advantages, weights, mask)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(outputs))


def test_a_nan_that_counts_is_not_hidden():
    log_ratio, advantages, weights, mask = make_inputs()
    mask[2, 3], log_ratio[2, 3] = True, np.nan
    (value, metrics), _ = value_and_grad(log_ratio, advantages, weights, mask)
    assert np.isnan(value)
    assert np.isnan(metrics["ratio/max_deviation"])


def test_bad_input():
    log_ratio, advantages, weights, _ = make_inputs()
    with pytest.raises(ValueError, match="objective='grpo': must be one of ppo, reinforce"):
        loss.policy_loss(log_ratio, advantages, weights, CLIP, objective="grpo")
    with pytest.raises(ValueError, match="clip_range=0: must be > 0"):
        loss.policy_loss(log_ratio, advantages, weights, 0)
    with pytest.raises(AssertionError):
        loss.policy_loss(log_ratio, advantages[:, None], weights, CLIP)
