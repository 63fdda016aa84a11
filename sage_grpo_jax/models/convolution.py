"""The causal 3-D convolution of the video VAE, fast on CPUs and plain elsewhere.

XLA's CPU backend has a good 2-D convolution, a slow 3-D one, and a very slow gradient with respect to
the kernel when there are few channels. So on CPUs the convolution is a sum over temporal taps of 2-D
convolutions, its gradient with respect to the input is the same with the kernel reversed, and its
gradient with respect to the kernel is a handful of well-shaped matrix products. On every other platform
it is one `lax.conv_general_dilated`. The choice is made when the program is lowered, so a TPU program
compiled on a CPU host gets the plain convolution. `benchmarks/convolution.py` measures all of this.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax

_VOLUME = ("NDHWC", "DHWIO", "NDHWC")
_IMAGE = ("NHWC", "HWIO", "NHWC")


def causal_convolution(x_BxTxHxWxC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride-1 3-D convolution, causal in time, with replicated edges.

    The first frame is repeated in front, so output frame t sees frames <= t only; rows and columns are
    repeated on both sides. Matches `HunyuanVideo15CausalConv3d` of diffusers (without the bias).

    Args:
      x_BxTxHxWxC: input, channels last.
      kernel: [kt, kh, kw, C, O], kh and kw odd, same dtype as the input.

    Returns:
      [B, T, H, W, O] in the dtype of the input.
    """
    chex.assert_rank([x_BxTxHxWxC, kernel], 5)
    chex.assert_equal(x_BxTxHxWxC.shape[-1], kernel.shape[-2])
    kt, kh, kw = kernel.shape[:3]
    edges = ((0, 0), (kt - 1, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0))
    return valid_convolution(jnp.pad(x_BxTxHxWxC, edges, mode="edge"), kernel)


@jax.custom_vjp
def valid_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride-1 3-D convolution of already padded x [B, T, H, W, C] with [kt, kh, kw, C, O]."""
    return lax.platform_dependent(x, kernel, cpu=sum_of_taps, default=plain_convolution)


def _forward(x: jax.Array, kernel: jax.Array):
    return valid_convolution(x, kernel), (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    return lax.platform_dependent(*residuals, g, cpu=tap_gradients, default=plain_gradients)


valid_convolution.defvjp(_forward, _backward)


def plain_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's own 3-D convolution."""
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), "VALID", dimension_numbers=_VOLUME)


def plain_gradients(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `plain_convolution`, as JAX derives them."""
    return jax.vjp(plain_convolution, x, kernel)[1](g)


def sum_of_taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as one 2-D convolution over B*T images for each temporal tap."""
    batch, frames, height, width, channels = x.shape
    kt, kh, kw, _, out_channels = kernel.shape
    frames_out = frames - kt + 1

    def tap(t: int) -> jax.Array:
        images = x[:, t : t + frames_out].reshape(-1, height, width, channels)
        return lax.conv_general_dilated(
            images,
            kernel[t],
            (1, 1),
            "VALID",
            dimension_numbers=_IMAGE,
            preferred_element_type=jnp.float32,
        )

    total = sum(tap(t) for t in range(kt)).astype(x.dtype)
    return total.reshape(batch, frames_out, height - kh + 1, width - kw + 1, out_channels)


def tap_gradients(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `sum_of_taps` with respect to x and kernel."""
    kt, kh, kw = kernel.shape[:3]
    edges = [(0, 0)] + [(k - 1, k - 1) for k in (kt, kh, kw)] + [(0, 0)]
    reversed_kernel = kernel[::-1, ::-1, ::-1].swapaxes(-1, -2)
    x_gradient = sum_of_taps(jnp.pad(g, edges), reversed_kernel)
    return x_gradient, kernel_gradient(x, g, (kt, kh, kw)).astype(kernel.dtype)


def kernel_gradient(x: jax.Array, g: jax.Array, window: tuple[int, int, int]) -> jax.Array:
    """Kernel gradient [kt, kh, kw, C, O] from x [B, T, H, W, C] and g [B, T', H', W', O].

    With few channels, the textbook product of x (shifted) and g has far too small a result (C x O) to
    run well. Here `block` neighbouring pixels of a row share one product: it holds the pairs of every
    pixel of x and every pixel of g in the block, and the pairs at distance j are summed for tap j. The
    wasted pairs cost less than the speed that the larger product gains.
    """
    kt, kh, kw = window
    _, frames, height, width, out_channels = g.shape
    channels = x.shape[-1]
    block = _row_block(width, max(channels, out_channels))
    x_blocks = _overlapping_blocks(x, width // block, block, kw)
    g_blocks = g.reshape(-1, block * out_channels)

    def taps_of_row(t: int, i: int) -> jax.Array:
        rows = x_blocks[:, t : t + frames, i : i + height].reshape(g_blocks.shape[0], -1)
        pairs = lax.dot_general(
            rows, g_blocks, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        ).reshape(block + kw - 1, channels, block, out_channels)
        return jnp.stack([sum(pairs[j + n, :, n] for n in range(block)) for j in range(kw)])

    return jnp.stack(
        [jnp.stack([taps_of_row(t, i) for i in range(kh)]) for t in range(kt)]
    )  # [kt, kh, kw, C, O]


def _row_block(width: int, channels: int, target: int = 64) -> int:
    """Largest divisor of the width for which block * channels stays within the target."""
    limit = max(1, min(width, target // channels))
    return next(block for block in range(limit, 0, -1) if width % block == 0)


def _overlapping_blocks(x: jax.Array, count: int, block: int, kw: int) -> jax.Array:
    """Rows [.., W, C] as `count` blocks of block + kw - 1 pixels: [.., count, (block + kw - 1) * C]."""
    pixels = [
        lax.slice_in_dim(x, n, n + (count - 1) * block + 1, stride=block, axis=3)
        for n in range(block + kw - 1)
    ]
    return jnp.concatenate(pixels, axis=-1)
