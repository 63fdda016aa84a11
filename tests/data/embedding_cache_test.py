"""The embedding cache: what goes in comes out, half-written caches never appear, order resumes."""

import json

import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax.data import embedding_cache as ec
from sage_grpo_jax.data.prompts import Prompt

ENCODER = ec.Encoder("test", template_hash="abc", versions={"numpy": np.__version__})
NUM_PROMPTS, DIM = 10, 6


def prompts(n: int = NUM_PROMPTS) -> list[Prompt]:
    return [Prompt(f"id{i}", f"prompt number {i}, ünïcode") for i in range(n)]


def embedding(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal((1 + i % 5, DIM)).astype(np.float32)


def write(path, dtype: str = "float32", n: int = NUM_PROMPTS) -> ec.EmbeddingCache:
    with ec.EmbeddingCacheWriter(path, ENCODER, dtype) as writer:
        writer.set_negative(embedding(99))
        for i, prompt in enumerate(prompts(n)):
            byt5 = np.ones((2, 3)) if i == 4 else None
            writer.add(prompt, embedding(i), byt5)
    return ec.EmbeddingCache(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, dtype):
    cache = write(tmp_path / "cache", dtype)
    assert len(cache) == NUM_PROMPTS
    # bfloat16 keeps 8 bits: half a unit in the last place is 2^-9 of the value.
    tolerance = 0 if dtype == "float32" else 2**-8
    for i, prompt in enumerate(prompts()):
        entry = cache[i]
        assert (entry["id"], entry["prompt"]) == prompt
        assert entry["text"].dtype == np.float32
        np.testing.assert_allclose(entry["text"], embedding(i), rtol=tolerance)
        assert ("byt5" in entry) == (i == 4)
    np.testing.assert_array_equal(cache[4]["byt5"], np.ones((2, 3)))
    np.testing.assert_allclose(cache.negative["text"], embedding(99), rtol=tolerance)
    with pytest.raises(IndexError):
        cache[NUM_PROMPTS]


def test_manifest(tmp_path):
    cache = write(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert (manifest["dim"], manifest["byt5_dim"], manifest["max_length"]) == (DIM, 3, 5)
    assert (manifest["count"], manifest["dtype"]) == (NUM_PROMPTS, "float32")
    assert cache.encoder == ENCODER


def test_equal_contents_have_equal_fingerprints(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert write(tmp_path / "c", n=9).fingerprint != first.fingerprint


def test_nothing_appears_before_the_cache_is_complete(tmp_path):
    def write_half():
        with ec.EmbeddingCacheWriter(tmp_path / "cache", ENCODER) as writer:
            writer.add(prompts()[0], embedding(0))
            assert not (tmp_path / "cache").exists()
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_cache_is_not_touched(tmp_path):
    write(tmp_path / "cache")
    with pytest.raises(FileExistsError, match="exists"):
        ec.EmbeddingCacheWriter(tmp_path / "cache", ENCODER)
    assert len(ec.EmbeddingCache(tmp_path / "cache")) == NUM_PROMPTS


@pytest.mark.parametrize(
    ("prompt", "text", "message"),
    [
        (Prompt("id0", "x"), np.ones((2, DIM)), "id0.*added before"),
        (Prompt("", "x"), np.ones((2, DIM)), "id is empty"),
        (Prompt("new", "x"), np.ones((2, DIM + 1)), "width 7; the ones before have 6"),
        (Prompt("new", "x"), np.ones((0, DIM)), "shape"),
        (Prompt("new", "x"), np.full((2, DIM), np.nan), "not finite"),
    ],
)
def test_bad_entries(tmp_path, prompt, text, message):
    with ec.EmbeddingCacheWriter(tmp_path / "cache", ENCODER) as writer:
        writer.set_negative(embedding(0))
        writer.add(prompts()[0], embedding(0))
        with pytest.raises(ValueError, match=message):
            writer.add(prompt, text)


def test_bad_caches(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'float8'; allowed: bfloat16, float32"):
        ec.EmbeddingCacheWriter(tmp_path / "x", ENCODER, "float8")
    with (
        pytest.raises(ValueError, match="negative entry was not set"),
        ec.EmbeddingCacheWriter(tmp_path / "x", ENCODER) as writer,
    ):
        writer.add(prompts()[0], embedding(0))
    with (
        pytest.raises(ValueError, match="no prompts were added"),
        ec.EmbeddingCacheWriter(tmp_path / "x", ENCODER) as writer,
    ):
        writer.set_negative(embedding(0))
    with pytest.raises(FileNotFoundError, match="no embedding cache"):
        ec.EmbeddingCache(tmp_path / "x")
    write(tmp_path / "y")
    manifest = tmp_path / "y" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"count": 10', '"count": 11'))
    with pytest.raises(ValueError, match=r"has 11 records; the manifest says 12"):
        ec.EmbeddingCache(tmp_path / "y")
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format_version is 2"):
        ec.EmbeddingCache(tmp_path / "y")


def test_batches(tmp_path):
    cache = write(tmp_path / "cache")
    batch = next(ec.make_prompt_iterator(cache, 4, seed=0, shuffle=False))
    assert batch["ids"] == ["id0", "id1", "id2", "id3"]
    assert batch["prompts"] == [prompt.text for prompt in prompts()[:4]]
    assert batch["text"].shape == (4, 8, DIM)
    assert batch["mask"].sum(axis=1).tolist() == [1, 2, 3, 4]
    for row in range(4):
        np.testing.assert_array_equal(batch["text"][row, : row + 1], embedding(row))
    assert not batch["text"][~batch["mask"]].any()


def test_every_epoch_shows_every_prompt_in_a_new_order(tmp_path):
    iterator = ec.make_prompt_iterator(write(tmp_path / "cache"), 5, seed=3)
    epochs = [next(iterator)["ids"] + next(iterator)["ids"] for _ in range(3)]
    assert all(sorted(epoch) == sorted(p.id for p in prompts()) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = ec.make_prompt_iterator(write(tmp_path / "again"), 5, seed=3)
    assert next(again)["ids"] + next(again)["ids"] == epochs[0]


def test_without_repeat_it_ends(tmp_path):
    iterator = ec.make_prompt_iterator(write(tmp_path / "cache"), 4, seed=0, repeat=False)
    assert len(list(iterator)) == 2


def ids(iterator: grain.DatasetIterator, n: int) -> list[list[str]]:
    return [next(iterator)["ids"] for _ in range(n)]


def test_state_continues_exactly(tmp_path):
    cache = write(tmp_path / "cache")
    iterator = ec.make_prompt_iterator(cache, 3, seed=1)
    ids(iterator, 5)
    state = iterator.get_state()
    expected = ids(iterator, 6)
    other = ec.make_prompt_iterator(cache, 3, seed=1)
    other.set_state(state)
    assert ids(other, 6) == expected


def test_orbax_saves_and_restores_the_iterator(tmp_path):
    cache = write(tmp_path / "cache")
    iterator = ec.make_prompt_iterator(cache, 3, seed=1)
    ids(iterator, 4)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": iterator})
    expected = ids(iterator, 6)
    other = ec.make_prompt_iterator(cache, 3, seed=1)
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": other})
    assert ids(other, 6) == expected


def test_bad_iterator_settings(tmp_path):
    cache = write(tmp_path / "cache")
    with pytest.raises(ValueError, match="prompts_per_step is 0; allowed: at least 1"):
        ec.make_prompt_iterator(cache, 0, seed=0)
    with pytest.raises(ValueError, match="prompts_per_step is 11; allowed without repeat"):
        ec.make_prompt_iterator(cache, 11, seed=0, repeat=False)
    with pytest.raises(ValueError, match="length is 4; the longest prompt has 5"):
        ec.make_prompt_iterator(cache, 2, seed=0, length=4)
    with pytest.raises(ValueError, match="longest allowed is 1024"):
        ec.text_bucket(1025)
