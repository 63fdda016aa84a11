import jax
import numpy as np
import pytest
import torch

from sage_grpo_jax.grpo import kl


def make_means():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 3, 4, 5)).astype(np.float32)


def test_matches_torch_distributions():
    mean, mean_ref = make_means()
    std = np.float32([0.1, 1.0, 2.5])
    first, second = (
        torch.distributions.Normal(torch.tensor(m), torch.tensor(std)[:, None, None])
        for m in (mean, mean_ref)
    )
    want = torch.distributions.kl_divergence(first, second).numpy()
    np.testing.assert_allclose(kl.gaussian_kl(mean, mean_ref, std), want.mean((1, 2)), rtol=1e-5)
    got = kl.gaussian_kl(mean, mean_ref, std[:, None, None], reduction="sum")
    np.testing.assert_allclose(got, want.sum((1, 2)), rtol=1e-5)


def test_scalar_std_and_shift_in_units_of_std():
    mean = make_means()[0]
    np.testing.assert_allclose(kl.gaussian_kl(mean + 0.3, mean, 0.5), [0.18] * 3, rtol=1e-5)


def test_zero_std_gives_zero_with_finite_gradients():
    mean, mean_ref = make_means()
    std = np.float32([0.0, 1.0, 0.0])

    def total(mean, std):
        return kl.gaussian_kl(mean, mean_ref, std).sum()

    np.testing.assert_array_equal(kl.gaussian_kl(mean, mean_ref, std)[np.array([0, 2])], [0, 0])
    to_mean, to_std = jax.jit(jax.grad(total, argnums=(0, 1)))(mean, std)
    np.testing.assert_allclose(to_mean[1], (mean - mean_ref)[1] / 20, rtol=1e-5)
    assert not np.any(to_mean[0])
    assert np.all(np.isfinite(to_std))


def test_bad_input():
    mean, mean_ref = make_means()
    with pytest.raises(AssertionError):
        kl.gaussian_kl(mean, mean_ref[:2], 0.5)
    with pytest.raises(ValueError, match="reduction='max'"):
        kl.gaussian_kl(mean, mean_ref, 0.5, reduction="max")
