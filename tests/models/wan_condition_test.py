"""What Wan reads of an embedding cache: always 512 tokens, zeros after the prompt's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wan_oracle import TINY, make_inputs, make_oracle, oracle_output, ours_from_theirs, parameters

from sage_grpo_jax.models import wan

LENGTHS = (4, 2)


def arrays(tokens=7):
    _, _, condition = make_inputs(TINY, (1, 2, 2), LENGTHS, tokens)
    return {"text": condition.text, "text_mask": condition.text_mask}


@pytest.mark.parametrize("library", [np, jnp])
def test_prompts_are_filled_up_to_512_tokens(library):
    given = {name: library.asarray(value) for name, value in arrays().items()}
    condition = wan.make_condition(given, TINY, 1)
    assert condition.text.shape == (2, 512, TINY.text_dim)
    assert condition.text_mask.shape == (2, 512)
    np.testing.assert_array_equal(condition.text[:, :7], given["text"])
    assert not np.any(condition.text[:, 7:])
    np.testing.assert_array_equal(condition.text_mask.sum(axis=1), LENGTHS)
    assert condition.text_mask.dtype == bool
    rounded = dataclasses.replace(TINY, dtype="bfloat16")
    assert wan.make_condition(given, rounded, 1).text.dtype == jnp.bfloat16


def test_the_model_sees_what_the_pipeline_gives_it():
    """512 tokens without a mask, zeros after the prompt's own; another number is another model."""
    latents, timestep, condition = make_inputs(TINY, (1, 2, 2), LENGTHS)
    model = make_oracle(TINY)
    filled = np.zeros((2, 512, TINY.text_dim), np.float32)
    for row, length in enumerate(LENGTHS):
        filled[row, :length] = condition.text[row, :length]
    whole = wan.Condition(filled, np.ones((2, 512), bool))
    want = oracle_output(model, latents, timestep, whole)
    ours = wan.make_condition(condition._asdict(), TINY, 1)
    params = ours_from_theirs(TINY, parameters(model))
    got = jax.jit(wan.velocity, static_argnums=4)(params, latents, timestep, ours, TINY)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert np.abs(oracle_output(model, latents, timestep, condition) - want).max() > 1e-2


def test_more_tokens_than_the_model_knows_are_refused():
    assert wan.make_condition(arrays(512), TINY, 1).text.shape[1] == 512
    with pytest.raises(ValueError, match="text tokens=513: must be at most 512"):
        wan.make_condition(arrays(513), TINY, 1)


def test_the_other_branch_has_the_negative_prompt_for_every_sample():
    condition = wan.make_condition(arrays(), TINY, 1)
    negative = jax.tree.map(lambda x: x[:1] + 1 if x.dtype != bool else x[1:], condition)
    other = wan.unconditional(condition, negative)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, condition)
    for row in range(2):
        np.testing.assert_array_equal(other.text[row], negative.text[0])
        np.testing.assert_array_equal(other.text_mask[row], negative.text_mask[0])


def test_what_the_model_needs():
    needs = wan.embedding_needs(wan.WanConfig())
    assert (needs.text, needs.encoder, needs.text_tokens) == (4096, "umt5", 512)
    assert (needs.byt5, needs.image, needs.first_frame) == (None, None, False)
    condition = wan.make_condition(arrays(), TINY, 1)
    assert wan.with_step_end(condition, lambda: 1 / 0, TINY) is condition
