"""Times formulations of the causal 3-D convolution, and the VAE of moving shapes as a whole.

    JAX_PLATFORMS=cpu python benchmarks/convolution.py [--batch 8] [--repeats 10]

Wall time is the median, CPU time (all threads) the minimum over the repeats; on a busy machine
compare CPU times. "gradient" is forward and backward, with respect to input and kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from sage_grpo_jax.models import convolution, vae

# Frames, height, width, channels in and out at the levels of the moving-shapes VAE.
SHAPES = [
    (17, 32, 32, 8, 8),
    (17, 32, 32, 8, 3),
    (17, 16, 16, 16, 16),
    (17, 16, 16, 16, 32),
    (17, 16, 16, 32, 16),
    (9, 8, 8, 32, 32),
    (9, 8, 8, 32, 128),
    (5, 4, 4, 64, 64),
]
VAE = vae.VaeConfig(
    latent_channels=16,
    block_out_channels=(8, 16, 32, 32),
    layers_per_block=1,
    spatial_compression_ratio=8,
)


def pad(x: jax.Array) -> jax.Array:
    # Two frames before the first and none after the last: causal in time.
    return jnp.pad(x, ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)), mode="edge")


def one_image_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Temporal taps concatenated in the channels, then one 2-D convolution."""
    # [B·T, H + 2, W + 2, 3 C] against [3, 3, 3 C, out].
    batch, frames, height, width, channels = x.shape
    padded = pad(x)
    x = jnp.concatenate([padded[:, t : t + frames] for t in range(3)], axis=-1)
    out = lax.conv_general_dilated(
        x.reshape(-1, height + 2, width + 2, 3 * channels),
        kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, 3 * channels, -1),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out.reshape(batch, frames, height, width, -1)


def shifted(x: jax.Array) -> list[jax.Array]:
    """The input of each of the 27 taps, [B*T*H*W, C]."""
    frames, height, width, channels = x.shape[1:]
    padded = pad(x)
    return [
        padded[:, t : t + frames, i : i + height, j : j + width].reshape(-1, channels)
        for t in range(3)
        for i in range(3)
        for j in range(3)
    ]


def one_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """im2col: all 27 taps concatenated, one matrix product."""
    out = jnp.concatenate(shifted(x), axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    return out.reshape(*x.shape[:-1], -1)


def product_per_tap(x: jax.Array, kernel: jax.Array) -> jax.Array:
    taps = kernel.reshape(27, *kernel.shape[-2:])
    out = sum(x_tap @ tap for x_tap, tap in zip(shifted(x), taps, strict=True))
    return out.reshape(*x.shape[:-1], -1)


FORMULATIONS: dict[str, Callable] = {
    "3-D": lambda x, k: convolution.plain_convolution(pad(x), k),
    "2-D per temporal tap": lambda x, k: convolution.sum_of_taps(pad(x), k),
    "2-D, taps in channels": one_image_convolution,
    "im2col, one product": one_product,
    "one product per tap": product_per_tap,
    "ours (taps, own gradient)": convolution.causal_convolution,
}


def measure(function: Callable[[], object], repeats: int) -> str:
    """'median wall / minimum CPU' in milliseconds."""
    # The first call compiles.
    function()
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return f"{1e3 * np.median(wall):7.1f} /{1e3 * min(cpu):7.1f}"


def time_jax(apply: Callable, x: jax.Array, kernel: jax.Array, repeats: int) -> tuple[str, str]:
    # A scalar of the squares: its gradient depends on the output, as that of training does.
    forward = jax.jit(apply)
    gradient = jax.jit(jax.grad(lambda x, k: jnp.sum(apply(x, k) ** 2), argnums=(0, 1)))
    return tuple(measure(lambda f=f: f(x, kernel), repeats) for f in (forward, gradient))


def time_torch(x: jax.Array, kernel: jax.Array, repeats: int) -> tuple[str, str]:
    # Channels first, and [out, in, t, h, w] for the kernel.
    x = torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3).contiguous().requires_grad_()
    kernel = torch.tensor(np.asarray(kernel)).permute(4, 3, 0, 1, 2).contiguous().requires_grad_()

    def forward():
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
        return torch.nn.functional.conv3d(padded, kernel)

    def gradient():
        (forward() ** 2).sum().backward()

    return measure(lambda: forward().detach().numpy(), repeats), measure(gradient, repeats)


def time_vae(batch: int, repeats: int) -> None:
    params = vae.init_params(VAE, jax.random.key(0))
    video = jax.random.normal(jax.random.key(1), (batch, 17, 32, 32, 3))
    latents = jax.random.normal(jax.random.key(2), (batch, 5, 4, 4, 16))

    def loss(params):
        mean, _ = vae.encode(params, video, VAE)
        return jnp.mean((vae.decode(params, mean, VAE) - video) ** 2)

    programs = {
        "encode": jax.jit(lambda p: vae.encode(p, video, VAE)),
        "decode": jax.jit(lambda p: vae.decode(p, latents, VAE)),
        "training step": jax.jit(jax.grad(loss)),
    }
    for name, program in programs.items():
        print(f"VAE {name:14s} {measure(lambda f=program: f(params), repeats)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, ms: wall / CPU")
    for *clip, channels, out_channels in SHAPES:
        # Random values: zeros or denormals would take another time.
        x = jax.random.normal(jax.random.key(0), (args.batch, *clip, channels))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, channels, out_channels)) * 0.1
        print(f"\n{clip} {channels} -> {out_channels}{'':12s} {'forward':>16s} {'gradient':>17s}")
        for name, apply in FORMULATIONS.items():
            print(f"  {name:28s}", *time_jax(apply, x, kernel, args.repeats), flush=True)
        print(f"  {'PyTorch':28s}", *time_torch(x, kernel, args.repeats), flush=True)
    print()
    time_vae(args.batch, args.repeats)


if __name__ == "__main__":
    main()
