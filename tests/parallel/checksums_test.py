"""Checksums against numpy, on many shardings; what they notice."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sage_grpo_jax.parallel import checksums


def _oracle(words: np.ndarray) -> int:
    """The formula of the module with Python's whole numbers, element by element."""
    total = 0
    for i, word in enumerate(words.ravel().tolist()):
        x = (word + (i + 1) * 2654435761) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        total += x ^ x >> 16
    return total % 2**32


def _random_bits(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    bits = 8 * dtype.itemsize
    return np.random.default_rng(0).integers(0, 2**bits, shape, f"uint{bits}")


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 4), (0, 2)])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint16"]
)
def test_every_type_has_the_checksum_of_its_bits(dtype, shape):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    words = _random_bits(shape, dtype)
    array = jnp.asarray(words.view(dtype))
    assert checksums.checksums(array) == {"": _oracle(words)}


def test_bools_keys_and_scalars():
    flags = np.asarray([[True, False], [False, True]])
    keys = jax.random.split(jax.random.key(7), 3)
    found = checksums.checksums({"flags": flags, "keys": keys, "number": 2.5, "count": np.int32(9)})
    assert found == {
        "flags": _oracle(flags.astype(np.uint32)),
        "keys": _oracle(np.asarray(jax.random.key_data(keys))),
        "number": _oracle(np.float32(2.5).reshape(1).view(np.uint32)),
        "count": _oracle(np.uint32([9])),
    }


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_elements_of_64_bits_count_as_two_words(dtype):
    words = _random_bits((3, 4), np.dtype(dtype))
    with jax.enable_x64(True):
        assert checksums.checksums(words.view(dtype)) == {"": _oracle(words.view(np.uint32))}


@pytest.mark.parametrize(
    "spec",
    [
        (),
        ("data",),
        (None, "fsdp"),
        (None, None, ("fsdp", "context")),
        (("context", "data"), "fsdp"),
        ("context", "data", "fsdp"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_sharding_has_the_same_checksum_and_gathers_nothing(spec, dtype):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "context"))
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    words = _random_bits((8, 6, 12), dtype)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    array = jax.device_put(words.view(dtype), place)
    assert checksums.checksums([array]) == {"0": _oracle(words)}
    program = checksums._program(checksums._replicated(array)).lower(array).compile().as_text()
    for gather in ("all-gather", "all-to-all", "collective-permute"):
        assert gather not in program
    assert ("all-reduce" in program) == bool(spec)


def test_places_wrap_around_in_arrays_of_more_than_2_32_elements():
    """Only one element is asked for; XLA computes no other."""
    shape, index = (70_000, 1_000, 1_000), (69_999, 998, 997)
    place = jax.jit(lambda: checksums._places(shape)[index])()
    flat = (index[0] * shape[1] + index[1]) * shape[2] + index[2]
    assert flat > 2**36
    assert int(place) == (flat + 1) * 2654435761 % 2**32


def test_every_flipped_bit_is_noticed():
    words = np.asarray(jax.random.normal(jax.random.key(0), (5,))).view(np.uint32)
    seen = {_oracle(words)}
    for place in range(words.size):
        for bit in range(32):
            flipped = words.copy()
            flipped[place] ^= np.uint32(1 << bit)
            seen.add(checksums.checksums(flipped.view(np.float32))[""])
    assert len(seen) == 1 + 5 * 32


def test_what_a_plain_weighted_sum_misses_is_noticed():
    # Round numbers: the low 16 bits are zero, as after a conversion from bfloat16.
    array = np.asarray(jax.random.normal(jax.random.key(0), (2, 4096)).astype(jnp.bfloat16))
    array = array.astype(np.float32)
    signs, swapped = array.copy(), array.copy()
    signs[0, 3], signs[1, 8] = -array[0, 3], -array[1, 8]
    swapped[0, 0], swapped[0, 2048] = array[0, 2048], array[0, 0]
    blocks, shifted = array[::-1], np.roll(array, 1)
    changed = [signs, swapped, blocks, shifted, array.T]
    sums = {checksums.checksums(x)[""] for x in [array, *changed]}
    assert len(sums) == 1 + len(changed)


class _State(NamedTuple):
    params: dict
    moments: list


def test_leaves_are_named_by_their_path():
    state = _State({"blocks": {"kernel": 1.0}}, [2, {"mlp/out": 3}])
    assert list(checksums.checksums(state)) == [
        "params/blocks/kernel",
        "moments/0",
        "moments/1/mlp/out",
    ]
    with pytest.raises(ValueError, match="a/b: the path of several leaves"):
        checksums.checksums({"a": {"b": 1}, "a/b": 2})
    with pytest.raises(TypeError, match="dtype=complex64"):
        checksums.checksums(np.complex64(1))


def test_the_first_leaf_that_differs_is_named():
    expected = {"a": 1, "b": 2, "c": 3}
    assert checksums.difference(expected, {"a": 1, "b": 2}) is None
    message = "2 of 3 arrays do not have their checksum, first b"
    assert checksums.difference(expected, {"a": 1, "b": 0, "d": 3}) == message
