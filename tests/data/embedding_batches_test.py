"""Batches: padded to static shapes; in an order that resumes, also split over processes."""

import time

import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax.data import embedding_cache as ec
from sage_grpo_jax.data.prompts import Prompt

ENCODER = ec.Encoder("test")
NUM_PROMPTS, DIM = 10, 6


def prompts(n: int = NUM_PROMPTS) -> list[Prompt]:
    return [Prompt(f"id{i}", f"prompt number {i}") for i in range(n)]


def embedding(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal((1 + i % 5, DIM)).astype(np.float32)


def write(path, n: int = NUM_PROMPTS, quoting: tuple[int, ...] = ()) -> ec.EmbeddingCache:
    with ec.EmbeddingCacheWriter(path, ENCODER, "float32") as writer:
        writer.set_negative(embedding(99))
        for i, prompt in enumerate(prompts(n)):
            writer.add(prompt, embedding(i), np.full((i, 3), i) if i in quoting else None)
    return ec.EmbeddingCache(path)


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
    other = ec.make_prompt_iterator(write(tmp_path / "other"), 5, seed=4)
    assert next(other)["ids"] + next(other)["ids"] != epochs[0]


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
    with pytest.raises(ValueError, match="longest allowed is 1000"):
        ec.text_bucket(1001)
    with pytest.raises(ValueError, match="a multiple of the 3 processes"):
        ec.make_prompt_iterator(cache, 4, seed=0, process_count=3)
    with pytest.raises(ValueError, match=r"process_index is 2, process_count is 2; allowed: 0 <="):
        ec.make_prompt_iterator(cache, 4, seed=0, process_index=2, process_count=2)


def test_quoted_text_in_a_mixed_cache(tmp_path):
    cache = write(tmp_path / "cache", quoting=(2, 9))
    batches = ec.make_prompt_iterator(cache, 5, seed=0, shuffle=False, repeat=False)
    first, second = list(batches)
    for batch, quoting in ((first, {2: 2}), (second, {4: 9})):
        # Sizes come from the manifest: the same for every batch.
        assert batch["byt5"].shape == (5, 64, 3)
        counts = [quoting.get(row, 0) for row in range(5)]
        assert batch["byt5_mask"].sum(axis=1).tolist() == counts
        for row, count in enumerate(counts):
            assert batch["byt5_mask"][row, :count].all()
            assert (batch["byt5"][row, :count] == count).all()
            assert not batch["byt5"][row, count:].any()
    negative = cache.pad([cache.negative])
    assert negative["byt5"].shape == (1, 64, 3)
    assert not negative["byt5_mask"].any()
    with pytest.raises(ValueError, match="byt5_length is 8; the longest prompt has 9"):
        ec.make_prompt_iterator(cache, 5, seed=0, byt5_length=8)
    with pytest.raises(ValueError, match="'id9' has 9 tokens of byt5, allowed 8"):
        ec.pad_entries([cache[9]], 8, byt5_length=8)


def test_a_cache_without_quotes(tmp_path):
    cache = write(tmp_path / "cache")
    plain = next(ec.make_prompt_iterator(cache, 5, seed=0))
    assert sorted(plain) == ["ids", "mask", "prompts", "text"]
    # A caller that wants one structure for all of its caches says so.
    forced = next(ec.make_prompt_iterator(cache, 5, seed=0, byt5_length=16, byt5_dim=3))
    assert forced["byt5"].shape == (5, 16, 3)
    assert not forced["byt5_mask"].any()
    np.testing.assert_array_equal(forced["text"], plain["text"])


def test_buckets_follow_the_longest_of_the_cache(tmp_path):
    def lengths(tokens: int, glyphs: int) -> tuple[int, int]:
        path = tmp_path / f"{tokens}-{glyphs}"
        with ec.EmbeddingCacheWriter(path, ENCODER) as writer:
            writer.add(Prompt("short", "x"), np.ones((1, 2)))
            writer.add(Prompt("long", "x"), np.ones((tokens, 2)), np.ones((glyphs, 2)))
            writer.set_negative(np.ones((1, 2)))
        return ec.EmbeddingCache(path).lengths()

    assert lengths(200, 64) == (256, 64)
    assert lengths(257, 65) == (512, 128)
    assert lengths(1000, 256) == (1000, 256)


def test_images(tmp_path):
    with ec.EmbeddingCacheWriter(tmp_path / "cache", ENCODER, "float32") as writer:
        for i, prompt in enumerate(prompts(4)):
            latents = np.full((1, 2, 2, 3), i)
            writer.add(prompt, embedding(i), image=np.full((4, 5), i), image_latents=latents)
        writer.set_negative(embedding(9))
    cache = ec.EmbeddingCache(tmp_path / "cache")
    batch = next(ec.make_prompt_iterator(cache, 4, seed=0, shuffle=False))
    assert batch["image"].shape == (4, 4, 5)
    assert batch["image_latents"].shape == (4, 1, 2, 2, 3)
    assert batch["image_mask"].shape == (4, 4)
    assert batch["image_mask"].all()
    assert batch["image"][:, 0, 0].tolist() == batch["image_latents"][:, 0, 0, 0, 0].tolist()
    assert batch["image"][:, 0, 0].tolist() == [0, 1, 2, 3]
    assert "image" not in cache.pad([cache.negative])
    with pytest.raises(ValueError, match="prompt '' has no image; others of its batch have"):
        ec.pad_entries([cache[0], cache.negative], 8)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("repeat", [True, False])
def test_processes_share_every_batch(tmp_path, shuffle, repeat):
    cache = write(tmp_path / "cache", n=11, quoting=(2,))  # 2 batches of 4 and 3 prompts over
    options = {"seed": 5, "shuffle": shuffle, "repeat": repeat}
    whole = ec.make_prompt_iterator(cache, 4, **options)
    parts = [
        ec.make_prompt_iterator(cache, 4, **options, process_index=i, process_count=2)
        for i in range(2)
    ]
    for _ in range(8 if repeat else 2):
        expected = next(whole)
        for i, part in enumerate(parts):
            found = next(part)
            assert found["ids"] == expected["ids"][i::2]
            for field in ("text", "mask", "byt5", "byt5_mask"):
                np.testing.assert_array_equal(found[field], expected[field][i::2])
    if not repeat:
        for iterator in (whole, *parts):
            assert next(iterator, None) is None


@pytest.fixture
def read(monkeypatch):
    """The entries that were read, in any order."""
    indices = []
    get = ec.EmbeddingCache.__getitem__

    def counting(self, index):
        indices.append(index)
        return get(self, index)

    monkeypatch.setattr(ec.EmbeddingCache, "__getitem__", counting)
    return indices


def test_little_is_read_ahead(tmp_path, read):
    """A batch of the full model is hundreds of megabytes."""
    iterator = ec.make_prompt_iterator(write(tmp_path / "cache"), 4, seed=0)
    for _ in range(5):
        next(iterator)
    time.sleep(0.5)
    assert 5 * 4 <= len(read) <= (5 + 4) * 4


def test_a_process_reads_its_own_rows_only(tmp_path, read):
    cache = write(tmp_path / "cache")
    options = {"seed": 0, "shuffle": False, "repeat": False}
    list(ec.make_prompt_iterator(cache, 4, **options, process_index=1, process_count=2))
    assert sorted(set(read)) == [1, 3, 5, 7]


def test_a_part_continues_exactly(tmp_path):
    cache = write(tmp_path / "cache")
    options = {"seed": 2, "process_index": 1, "process_count": 2}
    iterator = ec.make_prompt_iterator(cache, 4, **options)
    ids(iterator, 3)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": iterator})
    expected = ids(iterator, 5)
    other = ec.make_prompt_iterator(cache, 4, **options)
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": other})
    assert ids(other, 5) == expected
