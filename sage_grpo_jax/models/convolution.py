"""The causal 3-D convolution of the video VAE, fast on CPUs and plain elsewhere.

XLA's CPU backend has a good 2-D convolution, a slow 3-D one, and a very slow gradient with respect
to the kernel when there are few channels. So on CPUs the convolution is a sum over temporal taps of
2-D convolutions, its gradient with respect to the input is the same with the kernel reversed, and
its gradient with respect to the kernel is a handful of well-shaped matrix products. On every other
platform it is one `lax.conv_general_dilated`. The choice is made when the program is lowered, so a
TPU program compiled on a CPU host gets the plain convolution. `benchmarks/convolution.py` measures
all of this.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax

_VOLUME = ("NDHWC", "DHWIO", "NDHWC")
_IMAGE = ("NHWC", "HWIO", "NHWC")
_BEST_CHANNELS = 16  # of XLA's 2-D convolution on CPUs


def causal_convolution(x_BxTxHxWxC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride-1 3-D convolution, causal in time, with replicated edges.

    The first frame is repeated in front, so output frame t sees frames <= t only; rows and columns
    are repeated on both sides. Matches `HunyuanVideo15CausalConv3d` of diffusers (without the
    bias).

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


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return valid_convolution(x, kernel), (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.platform_dependent(*residuals, g, cpu=tap_gradients, default=plain_gradients)


valid_convolution.defvjp(_forward, _backward)


def plain_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's own 3-D convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1, 1),
        "VALID",
        dimension_numbers=_VOLUME,
        # TPUs and GPUs would round float32 first; for bfloat16 this changes nothing.
        precision=lax.Precision.HIGHEST,
    )


def plain_gradients(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `plain_convolution`, as JAX derives them."""
    return jax.vjp(plain_convolution, x, kernel)[1](g)


def sum_of_taps(x: jax.Array, kernel: jax.Array, margin: tuple[int, int] = (0, 0)) -> jax.Array:
    """The convolution as one 2-D convolution over B*T images for each temporal tap.

    XLA's CPU convolution works best at 16 channels: fewer are packed, more outputs are split.

    Args:
      x: [B, T, H, W, C], already padded in time.
      kernel: [kt, kh, kw, C, O].
      margin: rows and columns of zeros added on each side.
    """
    *_, channels, features = kernel.shape
    if channels <= _BEST_CHANNELS < features:
        pieces = range(0, features, _BEST_CHANNELS)
        parts = [kernel[..., start : start + _BEST_CHANNELS] for start in pieces]
        return jnp.concatenate([sum_of_taps(x, part, margin) for part in parts], axis=-1)
    pairs = margin == (0, 0) and x.shape[3] % 2 == 0 and kernel.shape[2] == 3
    if pairs and 2 * max(channels, features) <= _BEST_CHANNELS:
        return _sum_of_taps_of_pairs(x, kernel)
    return _sum_of_taps(x, kernel, margin)


def _sum_of_taps(x: jax.Array, kernel: jax.Array, margin: tuple[int, int]) -> jax.Array:
    batch, frames, height, width, channels = x.shape
    frames_out = frames - kernel.shape[0] + 1

    def tap(t: int) -> jax.Array:
        return lax.conv_general_dilated(
            x[:, t : t + frames_out].reshape(-1, height, width, channels),
            kernel[t],
            (1, 1),
            [(m, m) for m in margin],
            dimension_numbers=_IMAGE,
            preferred_element_type=jnp.float32,
        )

    total = sum(tap(t) for t in range(kernel.shape[0])).astype(x.dtype)
    return total.reshape(batch, frames_out, *total.shape[1:])


def _sum_of_taps_of_pairs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Two neighbouring pixels of a row as one with twice the channels; kernels three wide.

    Outputs 2j and 2j + 1 see inputs 2j ... 2j + 3: two pairs, with a quarter of the taps zero.
    """
    kt, kh, _, channels, features = kernel.shape
    padded = features + -features % 4
    kernel = jnp.pad(kernel, ((0, 0),) * 4 + ((0, padded - features),))
    # [kt, kh, 4 inputs, C, 2 outputs, O]
    of_pairs = jnp.stack(
        [jnp.pad(kernel, ((0, 0), (0, 0), (o, 1 - o), (0, 0), (0, 0))) for o in range(2)], axis=4
    )
    of_pairs = of_pairs.reshape(kt, kh, 2, 2 * channels, 2 * padded)
    batch, frames, height, width = x.shape[:4]
    out = _sum_of_taps(x.reshape(batch, frames, height, width // 2, 2 * channels), of_pairs, (0, 0))
    return out.reshape(*out.shape[:3], width - 2, padded)[..., :features]


def tap_gradients(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `sum_of_taps` (without margin) with respect to x and kernel."""
    kt, kh, kw = kernel.shape[:3]
    reversed_kernel = kernel[::-1, ::-1, ::-1].swapaxes(-1, -2)
    # The margin belongs to the convolution and not to a pad before it: a convolution whose output
    # is larger than its input stays with Eigen, where XLA's other CPU library (YNNPACK) is up to
    # eight times slower when many channels go to few.
    x_gradient = sum_of_taps(_pad_frames(g, kt - 1, kt - 1), reversed_kernel, (kh - 1, kw - 1))
    return x_gradient, kernel_gradient(x, g, (kt, kh, kw)).astype(kernel.dtype)


def kernel_gradient(x: jax.Array, g: jax.Array, window: tuple[int, int, int]) -> jax.Array:
    """Kernel gradient [kt, kh, kw, C, O] in float32, x [B, T, H, W, C] and g [B, T', H', W', O].

    With few channels, the textbook product of g and the shifted x has far too small a result, C by
    O, to run well. Here `block` neighbouring pixels of a row and all temporal taps share one
    product: it holds the pairs of every pixel of x and every pixel of g in the block, and the pairs
    at distance j are summed for tap j. The wasted pairs cost less than the speed that the larger
    product gains.
    """
    kt, kh, kw = window
    batch, _, height, width, out_channels = g.shape
    channels = x.shape[-1]
    block = _row_block(width, max(channels, out_channels))

    # [B, T, H, W' / block, (block + kw - 1) * C]: kw taps reach kw - 1 pixels beyond the block.
    x_blocks = _overlapping_blocks(x, width // block, block, kw)
    g_blocks = g.reshape(batch, -1, height, width // block, block * out_channels)
    # Shifting g rather than x in time: dw[t] = sum_s x[s] g[s - t].
    g_blocks = jnp.concatenate([_pad_frames(g_blocks, t, kt - 1 - t) for t in range(kt)], axis=-1)
    g_blocks = g_blocks.reshape(-1, g_blocks.shape[-1])  # [blocks, kt * block * O]

    # One product over all blocks for each tap along the height, which sees x from its row on.
    pairs = jnp.stack(
        [
            lax.dot_general(
                x_blocks[:, :, i : i + height].reshape(g_blocks.shape[0], -1),
                g_blocks,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            for i in range(kh)
        ]
    ).reshape(kh, block + kw - 1, channels, kt, block, out_channels)

    # At tap j, pixel n of a block of g meets pixel n + j of the block of x.
    taps = [sum(pairs[:, j + n, :, :, n] for n in range(block)) for j in range(kw)]
    return jnp.stack(taps).transpose(3, 1, 0, 2, 4)  # [kw, kh, C, kt, O] -> [kt, kh, kw, C, O]


def _pad_frames(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)))


def _row_block(width: int, channels: int, target: int = 64) -> int:
    """Largest divisor of the width for which block * channels stays within the target."""
    limit = max(1, min(width, target // channels))
    return next(block for block in range(limit, 0, -1) if width % block == 0)


def _overlapping_blocks(x: jax.Array, count: int, block: int, kw: int) -> jax.Array:
    """Rows [.., W, C] as blocks of block + kw - 1 pixels: [.., count, (block + kw - 1) * C]."""
    pixels = [
        lax.slice_in_dim(x, n, n + (count - 1) * block + 1, stride=block, axis=3)
        for n in range(block + kw - 1)
    ]
    return jnp.concatenate(pixels, axis=-1)
