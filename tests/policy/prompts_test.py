"""The prompts of a run: which split is read for what, and what is refused."""

import pytest

from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.policy.networks import read_networks
from sage_grpo_jax.worlds.moving_shapes import spec


@pytest.fixture
def open_prompts(make_config, tmp_path):
    """open_prompts(overrides) -> `Prompts` of the tiny recipe."""

    def make(overrides=None):
        config = make_config(overrides)
        return prompts_lib.open_prompts(config, tmp_path, read_networks(config.model))

    return make


def test_more_prompts_than_there_are_is_refused(open_prompts):
    with pytest.raises(ValueError, match=r"config.eval.num_test_prompts: got 73; allowed: .* 72 "):
        open_prompts({"eval.num_test_prompts": 73})


def test_evaluation_prompts_follow_their_own_seed_alone(open_prompts):
    def chosen(overrides=None):
        prompts = open_prompts(overrides)
        return prompts.evaluation.ids, prompts.test.ids

    first = chosen()
    assert chosen({"seed": 9, "eval.every": 7, "num_steps": 3}) == first
    other = chosen({"eval.seed": 1})
    assert other[0] != first[0]
    assert other[1] != first[1]
    repeated = chosen({"eval.samples_per_prompt": 3})
    for names, once in zip(repeated, first, strict=True):
        assert names == [name for name in once for _ in range(3)]


def test_every_split_is_read_from_its_own_prompts(open_prompts):
    prompts = open_prompts({"eval.num_prompts": 72, "eval.num_test_prompts": 0})
    assert set(prompts.evaluation.prompts) == set(spec.split_captions("validation"))
    assert set(prompts.test.prompts) == set(spec.split_captions("test"))
    seen = {text for _ in range(20) for text in next(iter(prompts)).prompts}
    assert seen <= set(spec.split_captions("train"))
    assert open_prompts({"data.test_prompts": ""}).test is None


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("moving_shapes:held_back", "moving_shapes:train"),
        ("absent.txt", "absent.txt"),
        ("cache:nowhere", "manifest"),
    ],
)
def test_a_source_that_is_not_there_is_refused_by_field(open_prompts, source, allowed):
    with pytest.raises(ValueError, match=rf"^config\.data\.train_prompts: .*{allowed}"):
        open_prompts({"data.train_prompts": source})


def test_captions_that_the_world_cannot_say_are_refused(open_prompts, tmp_path):
    (tmp_path / "prompts.txt").write_text("a large red disk\na purple elephant\n")
    with pytest.raises(ValueError, match=r"^config\.data\.train_prompts: .*elephant"):
        open_prompts({"data.train_prompts": str(tmp_path / "prompts.txt")})


def test_embeddings_of_edited_prompts_are_made_again(open_prompts, tmp_path):
    first, second = spec.split_captions("train")[:2]
    path = tmp_path / "prompts.txt"
    found = []
    for text in (first, second, first):
        path.write_text(f"{text}\n")
        prompts = open_prompts({"data.train_prompts": str(path), "rollout.prompts_per_step": 1})
        assert next(iter(prompts)).prompts == [text]
        found.append(prompts.fingerprint)
    assert found[0] == found[2] != found[1]
    assert len(list((tmp_path / "embeddings").glob("train_prompts-*"))) == 2
