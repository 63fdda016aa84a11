"""What the model is conditioned on: text, quoted text, a first frame; and the other branch."""

import dataclasses

import jax
import jax.numpy as jnp
import learners
import numpy as np
import pytest

from sage_grpo_jax import weights
from sage_grpo_jax.data import embedding_cache
from sage_grpo_jax.data.prompts import Prompt
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.worlds.moving_shapes import spec as moving_shapes_spec

DIM, BYT5_DIM, IMAGE_DIM = 8, 6, 5
MODEL = hunyuan_video.HunyuanVideoConfig()
QUOTED = frozenset({1, 2})


def make_cache(path, count=5, with_image=True):
    """Random embeddings; the prompts in QUOTED have a ByT5 entry."""
    rng, captions = np.random.default_rng(0), moving_shapes_spec.train_captions()
    encoder = embedding_cache.Encoder("random")
    with embedding_cache.EmbeddingCacheWriter(path, encoder, "float32") as writer:
        for i in range(count):
            image = {}
            if with_image:
                image["image"] = rng.standard_normal((3, IMAGE_DIM))
                image["image_latents"] = rng.standard_normal((1, 4, 4, 4))
            byt5 = rng.standard_normal((2 + i, BYT5_DIM)) if i in QUOTED else None
            writer.add(Prompt(f"p{i}", captions[i]), rng.standard_normal((3 + i, DIM)), byt5,
                       **image)  # fmt: skip
        writer.set_negative(rng.standard_normal((2, DIM)))
    return path


@pytest.fixture(scope="module")
def networks(tiny_networks, tmp_path_factory):
    """The tiny pair, with a ByT5 mapper and a vision projection."""
    folder = tmp_path_factory.mktemp("image_to_video")
    config = dataclasses.replace(
        weights.load_config(tiny_networks / "transformer"),
        text_embed_2_dim=BYT5_DIM,
        image_embed_dim=IMAGE_DIM,
    )
    shapes = jax.eval_shape(lambda: hunyuan_video.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.float32(0.2 * rng.standard_normal(s.shape)), shapes)
    weights.save(params, folder / "transformer", config=config)
    return {"transformer": str(folder / "transformer")}


def overrides(networks, cache):
    return {
        "model.transformer": networks["transformer"],
        "data.train_prompts": f"cache:{cache}",
        "data.eval_prompts": f"cache:{cache}",
        "data.test_prompts": "",
        "data.text_encoder": "cache",
        "data.max_text_tokens": 0,
        "rollout.guidance": 3.0,
        "rollout.prompts_per_step": 4,
        "rollout.group_size": 2,
        "trust_region.kind": "none",
        "eval.num_prompts": 4,
    }


def test_a_step_of_image_to_video(make_config, networks, local_scorer, tmp_path):
    config = make_config(overrides(networks, make_cache(tmp_path / "cache")))
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = learners.make(config, local_scorer(), mesh, tmp_path)
        batch = next(iter(trainer.prompts))
        condition = trainer.learner.condition(batch)
        _, metrics = trainer.learner.step(trainer.state, batch)
    assert metrics["update/applied"] == 1
    assert metrics["ratio/max_deviation"] == 0

    cache = embedding_cache.EmbeddingCache(tmp_path / "cache")
    entries = {entry["id"]: entry for entry in (cache[i] for i in range(len(cache)))}
    assert condition.text.shape == (4, 8, DIM)  # the bucket of 7 tokens
    assert condition.latents.shape == (4, 2, 4, 4, 5)
    for row, name in enumerate(batch.ids):
        entry = entries[name]
        length = len(entry["text"])
        np.testing.assert_array_equal(condition.text[row, :length], entry["text"])
        assert condition.text_mask[row].sum() == length
        assert condition.byt5_mask[row].sum() == len(entry.get("byt5", ()))
        np.testing.assert_array_equal(condition.latents[row, 0, ..., :4], entry["image_latents"][0])
        np.testing.assert_array_equal(condition.image[row], entry["image"])
    assert (condition.latents[:, 0, ..., 4] == 1).all()
    assert not condition.latents[:, 1:].any()


def test_the_other_branch_keeps_the_frame_and_drops_the_text(tmp_path):
    cache = embedding_cache.EmbeddingCache(make_cache(tmp_path / "cache"))
    entries = embedding_cache.pad_entries([cache[1], cache[2]], 8)
    (batch,) = conditions.batches(iter([entries]))
    (negative,) = conditions.batches(iter([embedding_cache.pad_entries([cache.negative], 8)]))
    place = sharding.replicated(mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    condition = conditions.to_condition(batch, place, MODEL, 2)
    other = hunyuan_video.unconditional(
        condition, conditions.to_condition(negative, place, MODEL, 2)
    )
    for row in range(2):
        np.testing.assert_array_equal(other.text[row, :2], cache.negative["text"])
        assert other.text_mask[row].tolist() == [True] * 2 + [False] * 6
    assert not other.byt5_mask.any()
    np.testing.assert_array_equal(other.latents, condition.latents)
    np.testing.assert_array_equal(other.image, condition.image)
    assert jax.tree.structure(other) == jax.tree.structure(condition)


def test_a_negative_prompt_that_quotes_text_keeps_it(make_config, networks, tmp_path):
    """In the other branch of guidance, also where training and evaluation prompts quote less."""
    path = tmp_path / "cache"
    with embedding_cache.EmbeddingCacheWriter(path, embedding_cache.Encoder("r"), "float32") as out:
        rng, captions = np.random.default_rng(0), moving_shapes_spec.train_captions()
        for i in range(4):
            out.add(Prompt(f"p{i}", captions[i]), rng.standard_normal((3 + i, DIM)))
        out.set_negative(rng.standard_normal((2, DIM)), rng.standard_normal((70, BYT5_DIM)))
    changes = {**overrides(networks, path), "rollout.prompts_per_step": 2}
    changes |= {"loss.micro_batch": 4, "rollout.decode_batch": 4}
    config = make_config(changes)
    prompts = prompts_lib.open_prompts(config, tmp_path, networks_lib.read_networks(config.model))
    place = sharding.replicated(mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    condition, negative = (
        conditions.to_condition(batch, place, MODEL, 2)
        for batch in (next(iter(prompts)), prompts.negative)
    )
    other = hunyuan_video.unconditional(condition, negative)
    entry = embedding_cache.EmbeddingCache(path).negative
    for row in range(2):
        assert not condition.byt5_mask[row].any()
        np.testing.assert_array_equal(other.byt5[row, :70], entry["byt5"])
        assert other.byt5_mask[row].tolist() == [True] * 70 + [False] * 58
    assert jax.tree.structure(other) == jax.tree.structure(condition)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, condition)


def test_rows_are_taken_with_everything_that_belongs_to_them(tmp_path):
    cache = embedding_cache.EmbeddingCache(make_cache(tmp_path / "cache"))
    entries = embedding_cache.pad_entries([cache[i] for i in range(3)], 8)
    (batch,) = conditions.batches(iter([entries]))
    repeated = batch.repeat(2)
    assert repeated.ids == ["p0", "p0", "p1", "p1", "p2", "p2"]
    for name in conditions.OPTIONAL:
        np.testing.assert_array_equal(repeated.extras[name][3], batch.extras[name][1])
    assert batch.take([2, 0]).prompts == [batch.prompts[2], batch.prompts[0]]


def test_a_cache_that_does_not_fit_is_refused(make_config, networks, tiny_networks, tmp_path):
    cache = make_cache(tmp_path / "cache")
    wrong = {**overrides(networks, cache), "model.transformer": str(tiny_networks / "transformer")}
    config = make_config(wrong)
    with pytest.raises(ValueError, match=r"config.data.train_prompts: .*byt5 width is 6"):
        prompts_lib.open_prompts(config, tmp_path, networks_lib.read_networks(config.model))
    larger = make_config({**overrides(networks, cache), "video.height": 64})
    with pytest.raises(ValueError, match="first frame's latents"):
        prompts_lib.open_prompts(larger, tmp_path, networks_lib.read_networks(larger.model))
    text = make_config({**overrides(networks, cache), "data.train_prompts": "prompts.txt"})
    with pytest.raises(ValueError, match="encode_prompts"):
        prompts_lib.open_prompts(text, tmp_path, networks_lib.read_networks(text.model))
    absent = make_config({**overrides(networks, cache), "data.train_prompts": "cache:nowhere"})
    with pytest.raises(ValueError, match=r"config.data.train_prompts: .*manifest"):
        prompts_lib.open_prompts(absent, tmp_path, networks_lib.read_networks(absent.model))
