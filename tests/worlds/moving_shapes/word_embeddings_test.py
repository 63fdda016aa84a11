"""Word embeddings: fixed for ever, of unit variance, distinct, in the order of the words."""

import numpy as np
import pytest

from sage_grpo_jax.data.embedding_cache import EmbeddingCache
from sage_grpo_jax.data.prompts import Prompt
from sage_grpo_jax.worlds.moving_shapes import spec as moving_shapes_spec
from sage_grpo_jax.worlds.moving_shapes import word_embeddings


def test_tokens_are_words_in_order():
    text = "A large red disk moves left, FAST."
    expected = ["a", "large", "red", "disk", "moves", "left", "fast"]
    assert word_embeddings.tokenize(text) == expected
    assert word_embeddings.tokenize("  ") == [word_embeddings.EMPTY_TOKEN]
    with pytest.raises(ValueError, match="has no word"):
        word_embeddings.tokenize("?!")


def test_vectors_never_change():
    # Written down once: shipped weights depend on these very values.
    expected = (-0.6093595, -0.15267178, 0.329849, 2.4255135)
    np.testing.assert_allclose(word_embeddings.word_vector("red")[:4], expected, rtol=1e-6)


def test_vectors_have_unit_variance_and_differ():
    words = [*moving_shapes_spec.vocabulary(), word_embeddings.EMPTY_TOKEN]
    vectors = np.stack([word_embeddings.word_vector(word) for word in words])
    np.testing.assert_allclose(np.mean(vectors.astype(np.float64) ** 2, axis=1), 1, rtol=1e-6)
    cosines = vectors @ vectors.T / vectors.shape[1] - np.eye(len(words))
    assert np.abs(cosines).max() < 0.8


def test_encode_stacks_word_vectors():
    encoded = word_embeddings.encode("red disk, red")
    assert encoded.shape == (3, word_embeddings.DIM)
    assert encoded.dtype == np.float32
    np.testing.assert_array_equal(encoded[0], encoded[2])
    np.testing.assert_array_equal(encoded[1], word_embeddings.word_vector("disk"))


def test_padded_batch():
    text, mask = word_embeddings.encode_padded(["red", "a red disk", ""], dim=8)
    assert text.shape == (3, 3, 8)
    assert mask.tolist() == [[True, False, False], [True] * 3, [True, False, False]]
    assert not text[~mask].any()


def test_writes_the_cache(tmp_path):
    prompts = [Prompt("x", "a red disk"), Prompt("y", "a blue square moves")]
    word_embeddings.write_cache(tmp_path / "cache", prompts)
    cache = EmbeddingCache(tmp_path / "cache")
    assert (len(cache), cache.dim, cache.max_length) == (2, word_embeddings.DIM, 4)
    np.testing.assert_array_equal(cache[1]["text"], word_embeddings.encode(prompts[1].text))
    np.testing.assert_array_equal(cache.negative["text"], word_embeddings.encode(""))
    assert cache.encoder == word_embeddings.encoder()
    assert word_embeddings.encoder().differences(word_embeddings.encoder(8))


def test_another_table_of_words_is_another_encoder(monkeypatch):
    mine, vector = word_embeddings.encoder(8), word_embeddings.word_vector
    monkeypatch.setattr(word_embeddings, "word_vector", lambda word, dim: 2 * vector(word, dim))
    assert word_embeddings.encoder(8).differences(mine).startswith("models.words is ")
