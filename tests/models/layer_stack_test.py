"""A stack of layers, however it is run, against a loop in float64."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.models import layer_stack

RNG = np.random.default_rng(0)
KERNELS = RNG.standard_normal((3, 4, 4), np.float32)
DOWN, UP = RNG.standard_normal((3, 4, 2), np.float32), RNG.standard_normal((3, 2, 4), np.float32)
X, SCALE, STEP = RNG.standard_normal((2, 4), np.float32), 0.7, 1e-6


def apply(params, x):
    return x + jnp.tanh(x @ params["dense"]["kernel"])


def exact(kernels, x):
    x = x.astype(np.float64)
    for kernel in kernels:
        x = x + np.tanh(x @ kernel)
    return x


def exact_slope(kernels, direction):
    """Derivative of the sum of squares along a direction, by central differences."""
    ends = [np.sum(exact(kernels + sign * STEP * direction, X) ** 2) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_output_and_gradient(remat, unroll, adapted):
    adapters = {"dense": {"down": DOWN, "up": UP}} if adapted else None

    def loss(kernels):
        out = layer_stack.run(
            apply, jnp.asarray(X), {"dense": {"kernel": kernels}},
            remat=remat, unroll=unroll, adapters=adapters, scale=SCALE,
        )  # fmt: skip
        return jnp.sum(jnp.square(out)), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(KERNELS))
    kernels = KERNELS.astype(np.float64)
    if adapted:
        kernels = kernels + SCALE * DOWN.astype(np.float64) @ UP
    np.testing.assert_allclose(out, exact(kernels, X), rtol=1e-5, atol=1e-5)
    direction = np.random.default_rng(1).standard_normal(KERNELS.shape)
    want = exact_slope(kernels, direction)
    np.testing.assert_allclose(np.vdot(gradient, direction), want, rtol=1e-4)


def test_recomputation_is_in_the_program_where_it_is_asked_for():
    for unroll in (False, True):
        for remat in (False, True):

            def run(kernels, remat=remat, unroll=unroll):
                params = {"dense": {"kernel": kernels}}
                out = layer_stack.run(apply, jnp.asarray(X), params, remat=remat, unroll=unroll)
                return jnp.sum(out)

            text = str(jax.make_jaxpr(jax.grad(run))(KERNELS))
            assert ("checkpoint" in text or "remat" in text) == remat
            assert ("scan[" in text) == (not unroll)


class Block(nn.Module):
    """x + tanh(x @ kernel) * what all blocks share."""

    config: types.SimpleNamespace

    @nn.compact
    def __call__(self, x, shared):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed", None))
        kernel = self.param("kernel", init, (4, 4))
        return x + jnp.tanh(x @ kernel) * shared, None


class Model(nn.Module):
    config: types.SimpleNamespace

    @nn.compact
    def __call__(self, x, shared, adapters=None):
        return layer_stack.blocks(self, Block, x, (shared,), adapters, SCALE)


@pytest.mark.parametrize("unroll", [False, True])
def test_blocks_of_a_model(unroll):
    """Parameters of their own below one key, and the same loop."""
    model = Model(types.SimpleNamespace(num_layers=3, remat=False, unroll=unroll))
    boxed = model.init(jax.random.key(0), X, jnp.ones(4))["params"]
    assert boxed["blocks"]["kernel"].names == ("layers", "embed", None)
    kernels = nn.unbox(boxed)["blocks"]["kernel"]
    assert kernels.shape == (3, 4, 4)
    assert len(np.unique(np.round(kernels, 4))) == kernels.size

    shared, want = np.arange(4.0), X.astype(np.float64)
    for kernel in np.asarray(kernels, np.float64) + SCALE * DOWN.astype(np.float64) @ UP:
        want = want + np.tanh(want @ kernel) * shared
    params, adapters = {"blocks": {"kernel": kernels}}, {"down": DOWN, "up": UP}
    got = model.apply({"params": params}, X, jnp.asarray(shared), adapters)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
