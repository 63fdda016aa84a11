import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sage_grpo_jax.models import convolution

# x [B, T, H, W, C], kernel [kt, kh, kw], output channels. The second has one pixel to a block, the
# third an even kernel in time and blocks of several pixels, the fourth more channels than a block
# holds. The fifth has few channels in and many out, the first and the last pack pairs of pixels.
SHAPES = [
    ((2, 5, 6, 8, 3), (3, 3, 3), 4),
    ((1, 3, 4, 7, 40), (3, 3, 3), 5),
    ((2, 1, 3, 9, 6), (2, 1, 5), 8),
    ((1, 2, 2, 4, 70), (1, 3, 3), 66),
    ((2, 3, 4, 6, 12), (3, 3, 3), 40),
    ((1, 3, 4, 6, 8), (2, 5, 3), 3),
]


def _inputs(shape, window, out_channels):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (*window, shape[-1], out_channels)) / shape[-1] ** 0.5
    cotangent = jax.random.normal(keys[2], (*shape[:-1], out_channels))
    return x, kernel, cotangent


def _torch_convolution(x, kernel, cotangent):
    """Output and both gradients in float64 from PyTorch, channels last."""
    x = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    kernel = torch.tensor(np.asarray(kernel, np.float64), requires_grad=True)
    kt, kh, kw = kernel.shape[:3]
    padded = torch.nn.functional.pad(
        x.permute(0, 4, 1, 2, 3), (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0), mode="replicate"
    )
    out = torch.nn.functional.conv3d(padded, kernel.permute(4, 3, 0, 1, 2)).permute(0, 2, 3, 4, 1)
    out.backward(torch.tensor(np.asarray(cotangent, np.float64)))
    return out.detach().numpy(), x.grad.numpy(), kernel.grad.numpy()


@pytest.mark.parametrize(("shape", "window", "out_channels"), SHAPES)
def test_output_and_gradients_equal_pytorch(shape, window, out_channels):
    x, kernel, cotangent = _inputs(shape, window, out_channels)

    @jax.jit
    def ours(x, kernel, cotangent):
        out, pullback = jax.vjp(convolution.causal_convolution, x, kernel)
        return out, *pullback(cotangent)

    for got, want in zip(
        ours(x, kernel, cotangent), _torch_convolution(x, kernel, cotangent), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "window", "out_channels"), SHAPES[:2])
def test_the_plain_form_equals_the_form_for_cpus(shape, window, out_channels):
    x, kernel, _ = _inputs(shape, window, out_channels)
    out = jax.jit(convolution.plain_convolution)(x, kernel)
    np.testing.assert_allclose(
        jax.jit(convolution.sum_of_taps)(x, kernel), out, atol=1e-5, rtol=1e-5
    )
    cotangent = jax.random.normal(jax.random.key(3), out.shape)
    plain = jax.jit(convolution.plain_gradients)(x, kernel, cotangent)
    taps = jax.jit(convolution.tap_gradients)(x, kernel, cotangent)
    for got, want in zip(taps, plain, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


def test_no_frame_sees_a_later_one():
    x, kernel, _ = _inputs(*SHAPES[0])
    apply = jax.jit(convolution.causal_convolution)
    changed = apply(x.at[:, 3:].add(1.0), kernel)
    np.testing.assert_array_equal(changed[:, :3], apply(x, kernel)[:, :3])
    assert not np.allclose(changed[:, 3], apply(x, kernel)[:, 3])


def test_bfloat16_accumulates_in_float32():
    x, kernel, cotangent = _inputs(*SHAPES[0])
    x, kernel, cotangent = (a.astype(jnp.bfloat16) for a in (x, kernel, cotangent))
    out, pullback = jax.vjp(jax.jit(convolution.causal_convolution), x, kernel)
    gradients = pullback(cotangent)
    assert {a.dtype for a in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    # bfloat16 has 8 bits: half a unit in the last place is 2^-9 of the value.
    want = _torch_convolution(x, kernel, cotangent)
    for got, exact in zip((out, *gradients), want, strict=True):
        scale = np.abs(exact).max()
        np.testing.assert_allclose(got.astype(np.float32), exact, atol=2**-8 * scale)


@pytest.mark.parametrize(("platform", "dimensions"), [("tpu", 5), ("cuda", 5), ("cpu", 4)])
def test_the_form_follows_the_platform_that_is_compiled_for(platform, dimensions):
    x, kernel, _ = _inputs(*SHAPES[0])
    traced = jax.jit(
        jax.grad(lambda x, k: convolution.causal_convolution(x, k).sum(), argnums=(0, 1))
    ).trace(x, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions
    ranks = {line.split("tensor<")[1].split(">")[0].count("x") for line in convolutions}
    assert ranks == {dimensions}


def test_bad_shapes_are_refused():
    x, kernel, _ = _inputs(*SHAPES[0])
    with pytest.raises(AssertionError):
        convolution.causal_convolution(x, kernel[..., :2, :])
    with pytest.raises(AssertionError):
        functools.partial(convolution.causal_convolution, x[0])(kernel)
