"""Small layers shared by the models, and sharding constraints by logical name.

Parameters are boxed with logical axis names (`nn.with_logical_partitioning`); the boxes never leave
`models/`. Kernels are float32 and cast to the compute dtype where they are used. Norms, modulation
and the time embedding compute in float32 whatever the compute dtype is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models import axes as axes_lib

HIGHEST = jax.lax.Precision.HIGHEST

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()
normal = nn.initializers.normal(stddev=0.02)


def current_platform() -> str:
    """Platform of the current mesh, be it only a topology to compile for; else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = getattr(device, "platform", None)
    return platform if platform is not None else jax.default_backend()


def mesh_axis_size(*names: str) -> int:
    """Product of the sizes of these axes of the current mesh; 1 where there is none."""
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    return int(np.prod([shape.get(name, 1) for name in names]))


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """The axes of the current mesh that a logical activation axis is laid over."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = {
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Auto and mesh.shape[axis] > 1
    }
    return tuple(axis for axis in axes_lib.ACTIVATIONS.get(name, ()) if axis in auto)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical axis names, one per dimension.

    A no-op without a mesh (`jax.set_mesh`). Dimensions that the mesh axes do not divide stay whole.
    """
    chex.assert_rank(x, len(logical))
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = []
    for size, name in zip(x.shape, logical, strict=True):
        axes = mesh_axes(name)
        spec.append(axes if axes and size % mesh_axis_size(*axes) == 0 else None)
    if not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(*spec))


def dense(
    features: int,
    axes: tuple[str | None, str | None],
    dtype: jnp.dtype,
    *,
    init: Callable = xavier,
    precision: jax.lax.Precision | None = None,
    name: str | None = None,
) -> nn.Dense:
    """A dense layer with bias; `axes` names the kernel's input and output axes.

    Biases stay whole on every device: gathering them costs more than it saves.
    """
    return nn.Dense(
        features,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(zeros, (None,)),
        name=name,
    )


def float32_dense(features: int, axes: tuple[str | None, str | None], **kwargs: Any) -> nn.Dense:
    """A dense layer that computes in float32 at the highest precision."""
    return dense(features, axes, jnp.float32, precision=HIGHEST, **kwargs)


def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """Zero mean, unit variance over the last axis, no affine; float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, computed in float32, returned in `dtype`."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones_init = nn.with_logical_partitioning(nn.initializers.ones_init(), (None,))
        zeros_init = nn.with_logical_partitioning(zeros, (None,))
        scale = self.param("scale", ones_init, (x.shape[-1],))
        bias = self.param("bias", zeros_init, (x.shape[-1],))
        return (layer_norm(x, self.epsilon) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a scale; float32 out."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, multiplier: float = 1.0) -> jax.Array:
        ones_init = nn.with_logical_partitioning(nn.initializers.ones_init(), (None,))
        scale = self.param("scale", ones_init, (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + self.epsilon) * (scale * multiplier)


class Mlp(nn.Module):
    """Two dense layers with an activation between them."""

    hidden: int
    features: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: jnp.dtype
    kernel_init: Callable = xavier

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = dense(self.hidden, ("embed", "mlp"), self.dtype, init=self.kernel_init, name="in")(x)
        out = dense(self.features, ("mlp", "embed"), self.dtype, init=self.kernel_init, name="out")
        return out(self.activation(x))


class VectorEmbed(nn.Module):
    """Dense, SiLU, dense in float32: one vector per sample to the model width."""

    features: int

    @nn.compact
    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        x = float32_dense(self.features, (None, "embed"), init=normal, name="in")(x_BxD)
        out = float32_dense(self.features, ("embed", "mlp"), init=normal, name="out")
        return out(nn.silu(x))


class Modulation(nn.Module):
    """SiLU and a dense layer: `count` vectors per sample, float32, each [B, 1, D].

    Under a mesh the product is taken where the kernel lies and the small result is summed over
    devices: gathering these kernels would move a third of the model for one vector a sample.
    """

    count: int
    features: int
    kernel_init: Callable = zeros  # the modulated block is the identity at first

    @nn.compact
    def __call__(self, vector_BxD: jax.Array) -> tuple[jax.Array, ...]:
        x = constrain(nn.silu(vector_BxD), "replica", "embed")
        layer = float32_dense(
            self.count * self.features, ("embed", "mlp"), init=self.kernel_init, name="linear"
        )
        x = constrain(layer(x), "batch", None)
        return tuple(jnp.split(x[:, None, :], self.count, axis=-1))


def sinusoid(timestep_B: jax.Array, channels: int = 256, max_period: float = 1e4) -> jax.Array:
    """Sinusoidal embedding of timesteps, 1000 * sigma: float32 [B, channels], cosines first."""
    chex.assert_rank(timestep_B, 1)
    half = channels // 2
    # float32 exponents as in the reference, each step rounded correctly: at t = 1000 the last bit
    # of a frequency moves the angle by 6e-5.
    exponent = (
        np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    )
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = timestep_B.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def partition_names(init_boxed: Callable[[Any, jax.Array], Any], config: Any) -> dict[str, Any]:
    """The tuple of logical axis names (or None) of each parameter, in a tree like theirs.

    Args:
      init_boxed: (config, key) -> parameters in Flax's boxes.
      config: of the model.
    """
    boxed = jax.eval_shape(functools.partial(init_boxed, config), jax.random.key(0))
    return jax.tree.map(
        lambda box: tuple(box.names),
        boxed,
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )
