"""What a workdir refuses: another encoder, another config, damaged files."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from sage_grpo_jax.data import embedding_cache, prompts
from sage_grpo_jax.training import workdir
from sage_grpo_jax.worlds.moving_shapes import spec as moving_shapes_spec


def test_an_embedding_cache_of_another_encoder(refused, tmp_path):
    encoder = embedding_cache.Encoder("another_encoder")
    embedding_cache.write_cache(
        tmp_path / "cache",
        [prompts.Prompt("a", "a red disk")],
        lambda text: np.ones((3, 24), np.float32),
        encoder,
    )
    message = refused({"data.train_prompts": f"cache:{tmp_path / 'cache'}"})
    assert (
        "(encoder 'another_encoder') does not fit: text width is 24, the model takes 8" in message
    )
    message = refused({"data.train_prompts": f"cache:{tmp_path / 'nowhere'}"})
    assert "no embedding cache at" in message
    (tmp_path / "cache" / "manifest.json").write_text("{")
    assert "not JSON" in refused({"data.train_prompts": f"cache:{tmp_path / 'cache'}"})


def _cache(path: pathlib.Path, encoder: embedding_cache.Encoder) -> str:
    """The name of a new cache in place of an old one; its texts do not depend on the encoder."""
    shutil.rmtree(path, ignore_errors=True)
    texts = [prompts.Prompt(text, text) for text in moving_shapes_spec.train_captions()[:3]]
    embedding_cache.write_cache(
        path, texts, lambda text: np.full((3, 8), len(text) / 50, np.float32), encoder
    )
    return f"cache:{path}"


QWEN = embedding_cache.Encoder(
    "qwen2_5_vl", "t" * 64, {"torch": "2.8.0"}, {"text_encoder": "a" * 64, "tokenizer": "b"}
)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"name": "clip"}, "name is 'clip', not 'qwen2_5_vl'"),
        ({"template_hash": ""}, f"template_hash is '', not '{'t' * 16}'"),
        (
            {"models": {"text_encoder": "c" * 64, "byt5": "d"}},
            f"models.byt5 is 'd', not None; models.text_encoder is '{'c' * 16}', not "
            f"'{'a' * 16}'; models.tokenizer is None, not 'b'",
        ),
    ],
)
def test_evaluation_prompts_of_another_encoder_as_wide(refused, tmp_path, changes, differing):
    other = dataclasses.replace(QWEN, **changes)
    sources = {
        "data.train_prompts": _cache(tmp_path / "train", QWEN),
        "data.eval_prompts": _cache(tmp_path / "eval", other),
        "data.test_prompts": "",
        "data.text_encoder": "cache",
    }
    assert refused(sources) == (
        f"config.data.eval_prompts: {sources['data.eval_prompts']} comes from another encoder "
        f"than config.data.train_prompts: {differing}; allowed: embeddings of the same encoder"
    )


@pytest.mark.parametrize(
    ("overrides", "known"),
    [
        ({"data.text_encoder": "words"}, "word_embeddings_8"),
        ({"data.text_encoder": "cache", "model.variant": "480p_t2v"}, "qwen2_5_vl"),
    ],
)
def test_an_encoder_that_the_model_was_not_trained_with(refused, tmp_path, overrides, known):
    good = _cache(tmp_path / "good", embedding_cache.Encoder(known))
    bad = _cache(tmp_path / "bad", embedding_cache.Encoder("another_encoder"))
    for field in ("train_prompts", "eval_prompts"):
        sources = {"data.train_prompts": good, "data.eval_prompts": good, f"data.{field}": bad}
        message = refused({**overrides, **sources})
        assert message.startswith(f"config.data.{field}: embedding cache ")
        assert message.endswith(f"encoder is 'another_encoder', the model takes '{known}'")


def test_a_run_goes_on_with_its_own_encoder_only(refused, runs, tmp_path):
    folder = tmp_path / "run"
    sources = {
        "data.train_prompts": f"cache:{tmp_path / 'train'}",
        "data.eval_prompts": f"cache:{tmp_path / 'eval'}",
        "data.test_prompts": "",
        "data.text_encoder": "cache",
    }

    def write(encoder):
        for name in ("train", "eval"):
            _cache(tmp_path / name, encoder)

    def accept():
        # The fixture ends a run that does something expensive.
        with pytest.raises(AssertionError, match="something expensive"):
            runs.train(folder, **sources)

    write(dataclasses.replace(QWEN, name="corrected before the first step"))
    accept()
    write(QWEN)
    accept()
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    write(dataclasses.replace(QWEN, models={**QWEN.models, "text_encoder": "c" * 64}))
    assert refused(sources) == (
        f"config.data.train_prompts: cache:{tmp_path / 'train'} comes from another encoder than "
        f"the embeddings that the run in {folder} began with: models.text_encoder is "
        f"'{'c' * 16}', not '{'a' * 16}'. Allowed: embeddings of the same encoder, or another "
        "folder"
    )
    write(dataclasses.replace(QWEN, versions={"torch": "2.9.1"}))
    accept()
    (folder / workdir.ENCODER_FILE).unlink()  # as in a folder of an older version
    accept()
    assert json.loads((folder / workdir.ENCODER_FILE).read_text())["name"] == QWEN.name


def test_a_field_that_is_younger_than_the_workdir(make_config, tmp_path):
    """It counts as its default, and is refused with another value."""
    workdir.claim(make_config(), tmp_path)
    path = tmp_path / workdir.CONFIG_FILE
    stored = json.loads(path.read_text())
    del stored["trust_region"]["kl_time_weight"]
    path.write_text(json.dumps(stored))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"kl_time_weight \('uniform' there, 'equalized' here\)"):
        workdir.claim(make_config({"trust_region.kl_time_weight": "equalized"}), tmp_path)
    workdir.claim(make_config(), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"name": ""}', '{"name": "a", "models": 3}'])
def test_a_damaged_memory_of_the_encoder_is_named(make_config, tmp_path, text):
    workdir.claim_encoder(make_config(), QWEN, tmp_path)
    path = tmp_path / workdir.ENCODER_FILE
    path.write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=rf"^--workdir: {path} ") as error:
        workdir.claim_encoder(make_config(), QWEN, tmp_path)
    assert "allowed: " in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metrics.jsonl", "garbage\n", "metrics.jsonl, line 1: not a row of metrics "),
        ("metrics.jsonl", '{"step": 0}\n[]\n', "metrics.jsonl, line 2: not a row of metrics "),
        ("metrics.jsonl", "[" * 100_000 + "\n", "metrics.jsonl, line 1: not a row of metrics "),
        ("config.json", "[" * 100_000, "config.json is damaged "),
        ("checkpoints", "", "checkpoints is a file; "),
    ],
)
def test_a_workdir_that_no_run_can_go_on_with(runs, tmp_path, name, text, expected):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(text)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=rf"^--workdir: {folder}/{expected}") as error:
        runs.train(folder)
    assert "allowed: " in str(error.value)
    assert "\n" not in str(error.value)
    (folder / ".lock").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
