"""The embedding cache: what goes in comes out; half-written and unfit caches are refused."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from array_record.python import array_record_module

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path, dtype):
    cache = write(tmp_path / "cache", dtype)
    assert len(cache) == NUM_PROMPTS
    # bfloat16 keeps 8 bits, float16 11: half a unit in the last place is 2^-9 or 2^-12.
    tolerance = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for i, prompt in enumerate(prompts()):
        entry = cache[i]
        assert (entry["id"], entry["prompt"]) == prompt[:2]
        assert entry["text"].dtype == np.float32
        np.testing.assert_allclose(entry["text"], embedding(i), rtol=tolerance)
        assert entry["byt5"].shape == (2 if i == 4 else 0, 3)
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


def test_encoders_are_compared_by_what_they_compute():
    one = ec.Encoder("a", "x", {"torch": "1"}, {"text_encoder": "p" * 64, "tokenizer": "q"})
    assert one.differences(one) == ""
    assert one.differences(dataclasses.replace(one, versions={"torch": "2"})) == ""
    unknown = dataclasses.replace(one, models={})  # as in caches of version 1
    assert one.differences(unknown) == unknown.differences(one) == ""
    changes = {"name": "b", "template_hash": "", "models": {"text_encoder": "r" * 64}}
    other = dataclasses.replace(one, **changes)
    assert other.differences(one) == (
        f"models.text_encoder is '{'r' * 16}', not '{'p' * 16}'; models.tokenizer is None, not "
        "'q'; name is 'b', not 'a'; template_hash is '', not 'x'"
    )
    # Compared whole, whatever is shown of them.
    near = dataclasses.replace(one, models={**one.models, "text_encoder": "p" * 63 + "q"})
    assert near.differences(one)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("qwen", "the encoder is 'qwen'; allowed: an object"),
        ({"name": None}, "the encoder has no name"),
        ({"name": "a", "models": ["b"]}, r"models is \['b'\]; allowed: .*models \(dict\)"),
        ({"name": "a", "speed": 1}, "speed is 1; allowed: name"),
    ],
)
def test_an_encoder_that_is_none_is_named(tmp_path, encoder, message):
    write(tmp_path / "cache")
    file = tmp_path / "cache" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "encoder": encoder}))
    with pytest.raises(ValueError, match=rf"manifest.json: .*{message}") as error:
        ec.EmbeddingCache(tmp_path / "cache")
    assert "write the cache again" in str(error.value)


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
    with pytest.raises(ValueError, match="dtype is 'float8'; allowed: bfloat16, float16, float32"):
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
    good = manifest.read_text()
    more = good.replace('"count": 10', '"count": 11').replace('"negative": 10', '"negative": 11')
    manifest.write_text(more)
    with pytest.raises(ValueError, match=r"has 11 records; the manifest says 12"):
        ec.EmbeddingCache(tmp_path / "y")
    for old, new, message in (
        ('"format_version": 2', '"format_version": 3', "format_version is 3; allowed: 1, 2"),
        ('"dtype": "float32"', '"dtype": "int8"', "dtype is 'int8'; allowed: bfloat16"),
        ('"negative": 10', '"negative": null', "no negative; write the cache again"),
        ('"negative": 10', '"negative": 3', "negative is 3; allowed: the last record"),
        ('"name": "test"', '"name": ""', "the encoder has no name"),
        ("}", "", "not JSON"),
    ):
        assert old in good
        manifest.write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=message):
            ec.EmbeddingCache(tmp_path / "y")
    manifest.write_text(good)
    ec.EmbeddingCache(tmp_path / "y").verify()


def write_images(path, n: int = 3) -> ec.EmbeddingCache:
    with ec.EmbeddingCacheWriter(path, ENCODER, details={"height": 32}) as writer:
        for i, prompt in enumerate(prompts(n)):
            writer.add(prompt, embedding(i), **images(i))
        writer.set_negative(embedding(99))
    return ec.EmbeddingCache(path)


def images(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + i)
    shapes = {"image": (7, 5), "image_latents": (1, 2, 3, 4)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_images(tmp_path):
    cache = write_images(tmp_path / "cache")
    assert (cache.image_shape, cache.image_latents_shape) == ((7, 5), (1, 2, 3, 4))
    assert cache.manifest["details"] == {"height": 32}
    assert cache.manifest["counts"] == {"text": 3, "byt5": 0, "image": 3, "image_latents": 3}
    for i in range(3):
        np.testing.assert_allclose(cache[i]["image"], images(i)["image"], rtol=2**-8)
        # Latents stay in float32 in a cache of bfloat16.
        np.testing.assert_array_equal(cache[i]["image_latents"], images(i)["image_latents"])
        assert "byt5" not in cache[i]
    assert sorted(cache.negative) == ["id", "prompt", "text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "'new' has no image; the ones before have one"),
        ({"image_latents": None}, "'new' has no image_latents; the ones before have one"),
        ({"image": np.ones((8, 5))}, r"shape \(8, 5\); the ones before have \(7, 5\)"),
        ({"image_latents": np.ones((1, 3, 2, 4))}, r"the ones before have \(1, 2, 3, 4\)"),
        ({"image_latents": np.ones((2, 2, 3, 4))}, r"allowed: \[1, h, w, C\]"),
        ({"image": np.full((7, 5), np.inf)}, "not finite"),
    ],
)
def test_bad_images(tmp_path, changes, message):
    with ec.EmbeddingCacheWriter(tmp_path / "cache", ENCODER) as writer:
        writer.set_negative(embedding(0))
        writer.add(prompts()[0], embedding(0), **images(0))
        with pytest.raises(ValueError, match=message):
            writer.add(Prompt("new", "x"), embedding(0), **(images(1) | changes))


def test_images_for_some_prompts_only(tmp_path):
    with ec.EmbeddingCacheWriter(tmp_path / "cache", ENCODER) as writer:
        writer.set_negative(embedding(0))
        writer.add(prompts()[0], embedding(0))
        with pytest.raises(ValueError, match="'id1' has an image; the ones before have none"):
            writer.add(prompts()[1], embedding(0), **images(0))


def test_too_large_for_float16(tmp_path):
    with ec.EmbeddingCacheWriter(tmp_path / "cache", ENCODER, "float16") as writer:
        writer.set_negative(embedding(0))
        writer.add(prompts()[0], embedding(0))
        with pytest.raises(ValueError, match="not finite in float16"):
            writer.add(prompts()[1], np.full((2, DIM), 1e6))


def test_records_of_version_1_are_read(tmp_path):
    """Written byte by byte as the format says; the manifest without what version 2 added."""
    folder = tmp_path / "cache"
    folder.mkdir()
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "embeddings.array_record"), "group_size:1"
    )
    values = [np.arange(6, dtype="<f4").reshape(2, 3) + i for i in range(2)]
    for name, array in zip(("a", ""), values, strict=True):
        header = {"id": name, "prompt": name, "dtype": "float32", "shapes": {"text": [2, 3]}}
        encoded = json.dumps(header).encode()
        writer.write(struct.pack("<I", len(encoded)) + encoded + array.tobytes())
    writer.close()
    manifest = {
        "format_version": 1, "encoder": {"name": "old", "template_hash": "", "versions": {}},
        "dtype": "float32", "dim": 3, "byt5_dim": None, "max_length": 2, "byt5_max_length": 0,
        "count": 1, "negative": 1, "sha256": "00",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    cache = ec.EmbeddingCache(folder)
    np.testing.assert_array_equal(cache[0]["text"], values[0])
    np.testing.assert_array_equal(cache.negative["text"], values[1])
    cache.check_fits(text_dim=3, encoder="old")
    with pytest.raises(ValueError, match="is damaged"):
        cache.verify()


def test_damage_is_found(tmp_path):
    write(tmp_path / "cache").verify()
    other = write(tmp_path / "other", n=9)
    records = "embeddings.array_record"
    with ec.EmbeddingCacheWriter(tmp_path / "third", ENCODER, "float32") as writer:
        writer.set_negative(embedding(98))
        for i, prompt in enumerate(prompts(9)):
            writer.add(prompt, embedding(i), np.ones((2, 3)) if i == 4 else None)
    (tmp_path / "other" / records).write_bytes((tmp_path / "third" / records).read_bytes())
    with pytest.raises(ValueError, match="is damaged"):
        ec.EmbeddingCache(other.path).verify()
    (tmp_path / "cache" / records).write_bytes(b"no records")
    with pytest.raises(ValueError, match=r"embeddings.array_record cannot be read"):
        ec.EmbeddingCache(tmp_path / "cache")


def test_caches_that_fit(tmp_path):
    text = write(tmp_path / "text")
    text.check_fits(text_dim=DIM, byt5_dim=3)
    text.check_fits(text_dim=DIM, byt5_dim=3, image_dim=1152, encoder="test")  # text-to-video
    both = write_images(tmp_path / "images")
    both.check_fits(text_dim=DIM, image_dim=5, latent_shape=(2, 3, 4))
    both.check_fits(text_dim=DIM, byt5_dim=8, image_dim=5, latent_shape=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("with_images", "model", "message"),
    [
        (False, {"text_dim": 7, "byt5_dim": 3}, "text width is 6, the model takes 7"),
        (False, {"text_dim": 6, "byt5_dim": 4}, "byt5 width is 3, the model takes 4"),
        (False, {"text_dim": 6}, "byt5 width is 3, the model takes None"),
        (False, {"text_dim": 6, "byt5_dim": 3, "encoder": "qwen"}, "model takes 'qwen'"),
        (False, {"text_dim": 6, "byt5_dim": 3, "image_dim": 5, "latent_shape": (2, 3, 4)},
         r"image width is None, .* 5; shape .* is None, the model takes \(2, 3, 4\)"),
        (True, {"text_dim": 6, "image_dim": 6, "latent_shape": (2, 3, 4)}, "image width is 5"),
        (True, {"text_dim": 6, "image_dim": 5, "latent_shape": (2, 4, 4)},
         r"\(2, 3, 4\), the model takes \(2, 4, 4\)"),
        (True, {"text_dim": 6, "image_dim": 5}, "the model takes None"),
    ],
)  # fmt: skip
def test_caches_that_do_not_fit(tmp_path, with_images, model, message):
    cache = (write_images if with_images else write)(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"does not fit: .*{message}"):
        cache.check_fits(**model)
