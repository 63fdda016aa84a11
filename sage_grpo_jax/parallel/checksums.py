"""Checksums of a tree of arrays, computed where the arrays are.

    checksum(leaf) = Σ_i mix(word_i + (i + 1)·φ)  mod 2^32

over the elements of a leaf: `word_i` are the bits of element i as an unsigned integer, i is its
place in the whole array (row-major), φ = 2^32 / golden ratio, and `mix` is the finalizer of
MurmurHash3 (Austin Appleby): a bijection of 32-bit words in which every bit of the input changes
about half of the output. One changed element is always noticed; of everything else (elements
swapped or shifted, blocks exchanged, many bits flipped) all but a share of 2^-32. A plain weighted
sum Σ w_i·word_i would miss much of that: two flipped signs cancel, as
2^31·(w_i + w_j) is a multiple of 2^32 for odd weights, and round numbers, whose low bits are zero,
can be swapped over distances of powers of two.

All of it is integer arithmetic that wraps around: any order of summation, and so any sharding, mesh
and number of hosts, gives the same bits.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B1  # odd, so that 2^32 places in a row have different offsets


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every leaf, by its path ("params/blocks/kernel").

    The arrays are read once, where they are; only the sums reach the host, on every process. All
    processes must call it together. The program is compiled for each shape: many leaves of a
    training state share theirs, and one program for all of them takes twice as long to compile.

    Args:
      tree: arrays (float, integer, bool, typed PRNG keys; also numpy and Python scalars), on one
        device or on the devices of one mesh, also those of other processes.

    Raises:
      TypeError: a leaf of another kind (complex numbers).
      ValueError: two leaves have the same path.
    """
    names = leaf_names(tree)
    # One after another: several sums over CPU devices that are under way at once block each other.
    sums = [int(_program(_replicated(leaf))(leaf)) for leaf in jax.tree.leaves(tree)]
    return dict(zip(names, sums, strict=True))


def leaf_names(tree: Any) -> list[str]:
    """The path of every leaf: keys, fields and indices, joined by slashes.

    Raises:
      ValueError: two leaves have the same path.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice}: the path of several leaves; allowed: one leaf for each path")
    return names


def difference(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    """Which leaves of `found` are not as expected: how many, and the first one; None: all are.

    A leaf of which nothing is expected is not either; `expected` may have more leaves.
    """
    wrong = [name for name, value in found.items() if expected.get(name) != value]
    if not wrong:
        return None
    return f"{len(wrong)} of {len(found)} arrays do not have their checksum, first {wrong[0]}"


def _replicated(leaf: Any) -> jax.sharding.Sharding | None:
    """Where the sum goes: onto every device of the mesh that the leaf is on."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


@functools.lru_cache(maxsize=8)
def _program(out_sharding: jax.sharding.Sharding | None) -> Any:
    return jax.jit(leaf_checksum, out_shardings=out_sharding)


def leaf_checksum(leaf: jax.Array) -> jax.Array:
    """uint32 []; see the module."""
    # The place is added before mixing, so that equal words at two places give unrelated numbers.
    words = _words(jnp.asarray(leaf))
    return jnp.sum(_mix(words + _places(words.shape)), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of every element as uint32; elements of 64 bits become two, on a last axis."""
    # Bits are summed, never values: -0.0 and 0.0 differ, and NaN is like itself.
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = _bits(array.dtype)
    if bits == 64:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, f"uint{bits}").astype(jnp.uint32)


def _bits(dtype: jnp.dtype) -> int:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    raise TypeError(f"dtype={dtype}: no checksum; allowed: floats, integers, bool, PRNG keys")


def _places(shape: tuple[int, ...]) -> jax.Array:
    """(i + 1)·φ for every element; never in memory: the sum computes them as it goes."""
    places = jnp.full(shape, _GOLDEN, jnp.uint32)
    for axis in range(len(shape)):
        # Wraps around beyond 2^32, in the stride as in the product.
        stride = math.prod(shape[axis + 1 :]) * _GOLDEN % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        places += index * jnp.uint32(stride)
    return places


def _mix(words: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (32 bits)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
