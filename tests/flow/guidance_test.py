from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.flow import guidance


class Condition(NamedTuple):
    text: jax.Array
    mask: jax.Array
    image: Any = None


def make_inputs(batch=4):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 6)), "out": rng.normal(size=(6, 5))}
    params = jax.tree.map(jnp.float32, params)
    latents = jnp.float32(rng.normal(size=(batch, 3, 5)))
    timestep = jnp.linspace(100.0, 1000.0, batch)

    def condition():
        mask = jnp.asarray(rng.integers(0, 2, (batch, 7)), bool)
        return Condition(jnp.float32(rng.normal(size=(batch, 7, 6))), mask)

    return params, latents, timestep, condition(), condition()


def model(params, latents, timestep, condition):
    hidden = jnp.einsum("bnc,cd->bnd", latents, params["w"], precision="highest")
    text = jnp.where(condition.mask[..., None], condition.text, 0.0).sum(1)
    hidden = jnp.tanh(hidden + text[:, None] + timestep[:, None, None] / 1000.0)
    return jnp.einsum("bnd,dc->bnc", hidden, params["out"], precision="highest")


def guided_by(scale, mode):
    def velocity(params, latents, timestep, condition, negative):
        fn = guidance.guided(lambda *args: model(params, *args), scale, mode)
        return fn(latents, timestep, condition, negative)

    return velocity


@pytest.mark.parametrize("mode", guidance.MODES)
@pytest.mark.parametrize("scale", [0.0, 2.5, 6.0])
def test_is_the_classifier_free_formula(mode, scale):
    params, latents, timestep, condition, negative = make_inputs()
    v_c = np.float64(model(params, latents, timestep, condition))
    v_u = np.float64(model(params, latents, timestep, negative))
    got = jax.jit(guided_by(scale, mode))(params, latents, timestep, condition, negative)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, v_u + scale * (v_c - v_u), rtol=1e-5, atol=2e-5)


def test_modes_agree_in_value_and_gradient():
    params, latents, timestep, condition, negative = make_inputs()

    def value_and_gradient(mode):
        def loss(params, latents):
            velocity = guided_by(6.0, mode)(params, latents, timestep, condition, negative)
            return jnp.mean(velocity**2)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, latents)

    batch, sequential = value_and_gradient("batch"), value_and_gradient("sequential")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), batch, sequential
    )


def test_scale_one_runs_a_single_branch():
    params, latents, timestep, condition, _ = make_inputs()
    batches = []

    def counting(latents, timestep, condition):
        batches.append(latents.shape[0])
        return model(params, latents, timestep, condition)

    for mode in guidance.MODES:
        got = guidance.guided(counting, 1.0, mode)(latents, timestep, condition)
        np.testing.assert_array_equal(got, model(params, latents, timestep, condition))
    assert batches == [4, 4]


def test_sequential_rematerializes_whole_branches():
    """Under grad it keeps no activations of a branch: a deep model costs about half the memory."""
    width, depth, batch = 32, 16, 1024
    weights = jnp.ones((depth, width, width)) / width
    latents, timestep = jnp.ones((batch, width)), jnp.ones(batch)
    condition, negative = jnp.ones((batch, width)), jnp.zeros((batch, width))

    def deep(weights, latents, timestep, condition):
        def layer(x, w):
            return jnp.tanh(jnp.dot(x, w, precision="highest")), None

        return jax.lax.scan(layer, latents + condition, weights)[0]

    def gradient(mode):
        def loss(weights):
            fn = guidance.guided(lambda *args: deep(weights, *args), 6.0, mode)
            return fn(latents, timestep, condition, negative).sum()

        return jax.jit(jax.grad(loss))

    assert "remat" in str(gradient("sequential").trace(weights).jaxpr)
    memory = {
        mode: gradient(mode).lower(weights).compile().memory_analysis().temp_size_in_bytes
        for mode in guidance.MODES
    }
    assert memory["sequential"] < 0.6 * memory["batch"]


def test_bad_input():
    params, latents, timestep, condition, negative = make_inputs()
    with pytest.raises(ValueError, match=r"scale=-1\.0"):
        guidance.guided(model, -1.0)
    with pytest.raises(ValueError, match="mode='both': must be one of batch, sequential"):
        guidance.guided(model, 2.0, "both")
    fn = guided_by(2.0, "batch")
    with pytest.raises(ValueError, match="must have the structure"):
        fn(params, latents, timestep, condition, None)
    with pytest.raises(ValueError, match="must have the shapes"):
        fn(params, latents, timestep, condition, jax.tree.map(lambda x: x[:2], negative))


@pytest.mark.parametrize("mode", guidance.MODES)
def test_the_gradient_of_the_condition_alone(mode):
    """The other branch is a constant: the gradient is that of scale·v_condition."""
    params, latents, timestep, condition, negative = make_inputs()

    def loss(params, gradient):
        fn = guidance.guided(lambda *args: model(params, *args), 3.0, mode, gradient)
        return jnp.sum(fn(latents, timestep, condition, negative) ** 2)

    v_u = model(params, latents, timestep, negative)

    def wanted(params):
        return jnp.sum((v_u + 3.0 * (model(params, latents, timestep, condition) - v_u)) ** 2)

    assert loss(params, "condition") == pytest.approx(float(loss(params, "both")), rel=1e-6)
    found, other = (jax.grad(loss)(params, gradient) for gradient in guidance.GRADIENTS[::-1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
        found,
        jax.grad(wanted)(params),
    )
    assert jnp.abs(found["w"] - other["w"]).max() > 0.1 * jnp.abs(found["w"]).max()


def test_unknown_gradients_are_refused():
    with pytest.raises(ValueError, match="gradient='negative': must be one of both, condition"):
        guidance.guided(model, 2.0, gradient="negative")
