"""Counter-based noise: every number follows from who needs it, not from when or where it is drawn.

key = fold_in(seed, step, slot, prompt, sample), then the stream, then t. Keys are threefry and the
draws are vmapped over them, so that any batch split, mesh or host count gives the same bits.
"""

from __future__ import annotations

import hashlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

# Streams of one sample's key. The numbers are part of every run: never reuse or renumber them.
_INITIAL_STREAM = 0
_STEP_STREAM = 1
_WINDOW_STREAM = 3
_FORWARD_STREAM = 4
_CHOICE_STREAM = 5
# Of the run's own key.
_ADAPTER_STREAM = 2
# In place of the index of a sample: what belongs to the whole group.
_GROUP = 2**32 - 1


def prompt_hash(prompt_id: str) -> np.uint32:
    """Returns the first 32 bits (big-endian) of SHA-256 of the prompt id."""
    return np.uint32(int.from_bytes(hashlib.sha256(prompt_id.encode("utf-8")).digest()[:4], "big"))


def sample_keys(seed: Any, step: Any, slot: Any, prompt_hashes: Any, samples: Any) -> jax.Array:
    """Returns one typed key per sample, keys[B].

    Args:
      seed: seed of the run, an integer or a typed key.
      step: rollout number, integer scalar (or [B]).
      slot: place of the prompt in its batch, so that a prompt that occurs twice gets other
        noise; integer scalar or [B].
      prompt_hashes: `prompt_hash` of each sample's prompt, uint32[B].
      samples: index of the sample within its group, integer[B].
    """
    # The generator is named: another default would change the noise of every run.
    if not _is_key(seed):
        seed = jax.random.key(seed, impl="threefry2x32")
    shape = jnp.broadcast_shapes(jnp.shape(prompt_hashes), jnp.shape(samples), jnp.shape(slot))
    if len(shape) != 1:
        raise ValueError(f"shape {shape} of prompt_hashes and samples: must be (B,)")

    # Each fold_in takes 32 bits. Order and number of the counters are part of every run.
    counters = [
        jnp.broadcast_to(jnp.asarray(counter).astype(jnp.uint32), shape)
        for counter in (step, slot, _as_uint32(prompt_hashes), samples)
    ]

    def one_key(*counters_of_sample: jax.Array) -> jax.Array:
        key = seed
        for counter in counters_of_sample:
            key = jax.random.fold_in(key, counter)
        return key

    return jax.vmap(one_key)(*counters)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal float32 [B, *shape], the state at σ = 1 of each sample."""
    check_keys(keys)
    return _normal(jax.vmap(lambda key: jax.random.fold_in(key, _INITIAL_STREAM))(keys), shape)


def step_noise(keys: jax.Array, t: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal float32 [B, *shape], the noise that step t injects.

    Args:
      keys: typed keys[B], one per sample.
      t: step index, 0 at σ = 1; integer scalar, or [B] for a micro-batch of mixed steps.
      shape: shape of one sample's latents.
    """
    return _normal(_step_keys(keys, _STEP_STREAM, t), shape)


def forward_noise(keys: jax.Array, t: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal float32 [B, *shape] that takes a clean sample back to σ of step t.

    Arguments as for `step_noise`; the numbers are independent of it.
    """
    return _normal(_step_keys(keys, _FORWARD_STREAM, t), shape)


def chosen_steps(keys: jax.Array, count: int, size: int) -> jax.Array:
    """Returns `size` of the numbers 0 ... count - 1 for each sample, without repetition.

    Every subset is as likely as every other.

    Args:
      keys: typed keys[B], one per sample.
      count: numbers to choose from.
      size: how many, 0 to count.

    Returns:
      int32[B, size], in ascending order.
    """
    check_keys(keys)
    if not 0 <= size <= count:
        raise ValueError(f"size={size}: must be 0 to count={count}")

    def choose(key: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(key, _CHOICE_STREAM), count)
        return jnp.sort(order[:size]).astype(jnp.int32)

    return jax.vmap(choose)(keys)


def window_starts(
    seed: Any, step: Any, slot: Any, prompt_hashes: Any, num_places: int
) -> np.ndarray:
    """Returns where the window of trained steps starts, int32[B] in 0 ... num_places - 1.

    Arguments as for `sample_keys`, without the sample: all samples of a group have the same start.
    """
    # No sample has this number: the whole group shares its window.
    count = np.full(np.shape(prompt_hashes), _GROUP, np.uint32)
    keys = sample_keys(seed, step, slot, prompt_hashes, count)

    def start(key: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, _WINDOW_STREAM), (), 0, num_places)

    return np.asarray(jax.vmap(start)(keys), np.int32)


def adapter_key(seed: int) -> jax.Array:
    """Returns the typed key of the initial LoRA adapters of a run."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _ADAPTER_STREAM)


def check_keys(keys: jax.Array) -> None:
    """Raises ValueError unless keys are typed PRNG keys of shape [B]."""
    if not _is_key(keys):
        raise ValueError("keys: must be typed PRNG keys, from jax.random.key or sample_keys")
    chex.assert_rank(keys, 1)


def _step_keys(keys: jax.Array, stream: int, t: Any) -> jax.Array:
    check_keys(keys)
    t_B = jnp.broadcast_to(jnp.asarray(t), keys.shape)

    def step_key(key: jax.Array, t: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, stream), t)

    return jax.vmap(step_key)(keys, t_B)


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Each key draws by itself, so that the bits of a sample do not depend on the batch.
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _as_uint32(values: Any) -> jax.Array:
    # Python ints above 2³¹ do not fit the default integer type.
    return values if isinstance(values, jax.Array) else jnp.asarray(values, jnp.uint32)


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
