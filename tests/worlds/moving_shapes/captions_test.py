"""Prompts that the small world cannot say are named with their words."""

import pytest

from sage_grpo_jax.data.prompts import Prompt
from sage_grpo_jax.worlds.moving_shapes import captions
from sage_grpo_jax.worlds.moving_shapes import spec as moving_shapes_spec

CAPTION = moving_shapes_spec.example_caption()


def check(*texts, whole=False):
    captions.check([Prompt(f"p{i}", text) for i, text in enumerate(texts)], whole=whole)


def test_every_caption_of_the_world_passes():
    texts = moving_shapes_spec.train_captions() + moving_shapes_spec.held_out_captions()
    check(*texts, whole=True)
    check(CAPTION.upper(), f"  {CAPTION}.", whole=True)
    assert captions.incomplete(texts) == []


def test_parts_of_a_caption_pass_where_no_reward_reads_them():
    check("a red disk", "green", "Small, Purple TRIANGLE!")
    assert captions.incomplete(["a red disk", CAPTION, "green"]) == ["a red disk", "green"]
    with pytest.raises(ValueError, match=r"prompt 'p1' \('a red disk'\): not a whole caption"):
        check(CAPTION, "a red disk", whole=True)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CAPTION.replace("red", "orange"), "'orange'"),
        (CAPTION.replace("disk", "disks"), "'disks'"),
        (CAPTION.replace("a large", "an enormous"), "'an', 'enormous'"),
        ("a cat and a cat", "'cat', 'and'"),
        ("ein roter Kreis", "'ein', 'roter', 'kreis'"),
    ],
)
def test_words_are_named_and_so_is_what_is_allowed(text, words, whole):
    with pytest.raises(ValueError, match="the small world has no word") as error:
        check(CAPTION, text, whole=whole)
    said = str(error.value)
    assert f"prompt 'p1' ({text!r}): the small world has no word {words}; allowed: a, " in said
    for word in moving_shapes_spec.vocabulary():
        assert word in said
    assert "p0" not in said


def test_many_prompts_are_counted_and_long_ones_cut():
    with pytest.raises(ValueError, match="and 7 more prompts") as error:
        check(*[f"a cat {'red ' * 100}"] * 10)
    assert len(str(error.value)) < 1500
    assert "\n" not in str(error.value)
