"""The language of the world, and the split of its combinations."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from sage_grpo_jax.worlds.moving_shapes import spec


def test_captions_read_back():
    for words in spec.all_words():
        assert spec.parse_caption(spec.caption(words)) == words


def test_example_caption():
    text = "a large red disk moves left, fast, over a dark background"
    assert spec.example_caption() == text
    assert spec.parse_caption(f" {text.upper()}. ") == (
        "large",
        "red",
        "disk",
        "left",
        "fast",
        "dark",
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "does not read like"),
        ("a disk", "does not read like"),
        (
            "a large red cube moves left, fast, over a dark background",
            "shape is 'cube', allowed: disk",
        ),
        ("a large red disk moves away, fast, over a dark background", "direction is 'away'"),
    ],
)
def test_bad_captions_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        spec.parse_caption(text)


def test_a_quarter_of_the_triples_is_held_out():
    train, held_out = spec.train_captions(), spec.held_out_captions()
    assert (len(train), len(held_out)) == (432, 144)
    assert len(set(train) | set(held_out)) == 576

    def triples(captions):
        return {(w.colour, w.shape, w.direction) for w in map(spec.parse_caption, captions)}

    assert len(triples(held_out)) == 18
    assert not triples(train) & triples(held_out)


def test_validation_and_test_share_the_held_out_triples():
    splits = {name: spec.split_captions(name) for name in spec.SPLITS}
    words = {name: [*map(spec.parse_caption, texts)] for name, texts in splits.items()}
    triples = {n: {(w.colour, w.shape, w.direction) for w in found} for n, found in words.items()}
    assert {n: len(t) for n, t in triples.items()} == {
        "train": 54,
        "validation": 9,
        "test": 9,
        "held_out": 18,
        "all": 72,
    }
    # Nothing that a result is reported on has been seen before, by whatever choice.
    assert not triples["test"] & (triples["train"] | triples["validation"])
    assert not triples["validation"] & triples["train"]
    assert triples["held_out"] == triples["validation"] | triples["test"]
    assert len(splits["validation"]) == len(splits["test"]) == 72
    for name in ("validation", "test"):
        for field, choices in zip(spec.Words._fields, spec.CHOICES, strict=True):
            assert {getattr(w, field) for w in words[name]} == set(choices)
        shapes = [w.shape for w in words[name]]
        assert {shape: shapes.count(shape) for shape in spec.SHAPES} == dict.fromkeys(
            spec.SHAPES, 24
        )


def test_every_pair_of_words_occurs_in_training():
    train = [spec.parse_caption(text) for text in spec.train_captions()]
    for a, b in itertools.combinations(spec.Words._fields, 2):
        seen = {(getattr(words, a), getattr(words, b)) for words in train}
        assert len(seen) == len(getattr(spec.CHOICES, a)) * len(getattr(spec.CHOICES, b))


def test_vocabulary_covers_the_captions():
    words = {w for text in spec.train_captions() for w in text.replace(",", "").split()}
    assert words == set(spec.vocabulary())
    assert len(spec.vocabulary()) == len(set(spec.vocabulary()))


def test_colours_are_well_separated():
    colours = np.concatenate([spec.COLOUR_RGB, spec.BACKGROUND_RGB])
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + 999 * np.eye(len(colours))
    assert apart.min() > 127
    assert apart[:6, 6:].min() > 154


def test_every_combination_has_room_to_start():
    low, high = spec.start_range_table()
    assert (high - low).min() > 2


def test_spec_does_not_import_jax():
    code = "import sys, sage_grpo_jax.worlds.moving_shapes.spec; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
