"""Caches of kinds other than Qwen2.5-VL: Wan's, against diffusers; and one that is made up here."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import WanPipeline
from safetensors.numpy import save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from sage_grpo_jax.data.embedding_cache import EmbeddingCache
from sage_grpo_jax.text_encoders import encode as encode_lib
from sage_grpo_jax.text_encoders import registry, work
from sage_grpo_jax.text_encoders.kind import Kind, Tokens

TEXTS = ['a "red" cat', "a  dog", "the grass (STOP) there", "a " * 700, "a cat walks", "sky"]
NEGATIVE = 'bad "quality"'


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": f"p{i}", "prompt": text}) for i, text in enumerate(TEXTS)]
    file.write_text("\n".join(lines) + "\n")
    return file


def request(pipeline, prompts, out, **changes):
    fields = {"batch_size": 2, "dtype": "float32", "device": "cpu", "negative_prompt": NEGATIVE}
    return encode_lib.Request(str(prompts), str(pipeline), str(out), **(fields | changes))


def encode_with_diffusers(pipeline, prompts):
    """Text of the prompts and of the negative one f32[P, 512, D], as Wan's transformer gets it."""
    wan = WanPipeline(
        AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
        UMT5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        vae=None,
        scheduler=None,
    )
    with torch.no_grad():
        found = wan.encode_prompt(prompts, NEGATIVE, max_sequence_length=512)
    return [tensor.numpy() for tensor in found]


def test_a_cache_for_wan(pipeline, prompts, tmp_path, capsys):
    cache = encode_lib.encode(request(pipeline, prompts, tmp_path / "cache"))
    notes = capsys.readouterr().err
    assert "prompts over 512 tokens, whose ends are cut: 1" in notes
    assert "byt5" not in notes
    text, negative = encode_with_diffusers(pipeline, TEXTS)
    # The zeros after a prompt are part of what Wan reads: it has no mask.
    padded = cache.pad([cache[i] for i in range(len(TEXTS))], length=512)
    np.testing.assert_allclose(padded["text"], text, atol=1e-5)
    np.testing.assert_array_equal(padded["mask"], text.any(axis=-1))
    assert "byt5" not in padded
    found = cache.pad([cache.negative], length=512)["text"]
    np.testing.assert_allclose(found, negative[:1], atol=1e-5)

    assert [cache[i]["prompt"] for i in range(6)] == [text.strip() for text in TEXTS]
    assert (cache.max_length, cache.dim, cache.byt5_dim) == (512, tiny_models.TEXT_DIM, None)
    cache.check_fits(text_dim=tiny_models.TEXT_DIM, encoder="umt5")
    with pytest.raises(ValueError, match=r"encoder is 'umt5', the model takes 'qwen2_5_vl'"):
        cache.check_fits(text_dim=tiny_models.TEXT_DIM, encoder="qwen2_5_vl")
    assert cache.manifest["details"] == {
        "compute_dtype": "float32", "device": "cpu", "negative_prompt": NEGATIVE,
        "max_tokens": 512, "truncated": 1,
    }  # fmt: skip
    assert cache.encoder.models.keys() == {"text_encoder", "tokenizer"}
    assert cache.encoder.versions["torch"] == torch.__version__
    assert "truncated" not in cache.encoder.versions


def test_stopped_and_run_again(pipeline, prompts, tmp_path, monkeypatch):
    """After any number of batches the same bytes come out, and only the rest is computed."""
    whole = encode_lib.encode(request(pipeline, prompts, tmp_path / "whole"))
    write, opened = work.WorkFolder.write, []
    open_encoder = registry.choose(pipeline / "text_encoder").open_encoder

    def stop(self, stage, batch, arrays):
        write(self, stage, batch, arrays)
        raise KeyboardInterrupt

    def count(*args):
        encoder = open_encoder(*args)
        return lambda tokens: opened.append(len(tokens)) or encoder(tokens)

    kind = dataclasses.replace(registry.choose(pipeline / "text_encoder"), open_encoder=count)
    monkeypatch.setattr(registry, "KINDS", (kind,))
    again = request(pipeline, prompts, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(work.WorkFolder, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_lib.encode(again)
    encode_lib.encode(again)
    assert opened == [2, 2, 2, 1]  # six prompts and the negative one, in batches of two
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cache" / file.name).read_bytes()
    assert len(whole) == 6
    with pytest.raises(FileExistsError, match="exists; remove it"):
        encode_lib.encode(dataclasses.replace(again, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"byt5": "."}, "byt5"),
        ({"image_encoder": ".", "vae": ".", "height": 32, "width": 48, "byt5": "none"},
         "byt5, image_encoder, vae, height, width"),
    ],
)  # fmt: skip
def test_flags_of_another_model(pipeline, prompts, tmp_path, changes, named):
    message = f"^{named}: not with a text_encoder of the kind umt5; allowed with: qwen2_5_vl$"
    with pytest.raises(ValueError, match=message):
        encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", **changes))
    assert not list(tmp_path.glob("cache*"))


def test_without_ftfy_nothing_is_begun(pipeline, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    prompts.write_text(json.dumps({"prompt": "ein größerer Hund"}) + "\n")
    with pytest.raises(ModuleNotFoundError, match=r"ftfy is not installed; .*'ein größerer Hund'"):
        encode_lib.encode(request(pipeline, prompts, tmp_path / "cache"))
    assert not list(tmp_path.glob("cache*"))


def test_images_of_prompts_are_left_out(pipeline, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a cat", "image": "cat.png"}) + "\n")
    encode_lib.encode(request(pipeline, file, tmp_path / "cache"))
    assert "images are left out: umt5 goes with none" in capsys.readouterr().err


class LetterTokenizer:
    """A token a letter, and one more."""

    template_hash = "t" * 64
    details = {"alphabet": "unicode"}  # noqa: RUF012

    def __init__(self, folder):
        assert (folder / "tokenizer_config.json").exists()

    def __call__(self, prompts):
        return [Tokens([*map(ord, prompt), 0][:3], len(prompt) > 2) for prompt in prompts]


def open_letters(folder, dtype, device, tokenizer):
    assert (dtype, device, type(tokenizer)) == ("float32", "cpu", LetterTokenizer)
    return lambda prompts: [np.outer(prompt.ids, [1, -1]).astype(np.float32) for prompt in prompts]


def test_a_further_kind_is_an_entry_of_the_registry(tmp_path, monkeypatch, prompts, capsys):
    kind = Kind("letters", ("letters",), (), 3, LetterTokenizer, open_letters)
    monkeypatch.setattr(registry, "KINDS", (*registry.KINDS, kind))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "letters"}')
    (folder / "tokenizer_config.json").write_text("{}")
    save_file({"w": np.zeros(1, np.float32)}, os.fspath(folder / "model.safetensors"))
    encode_lib.encode(request(folder, prompts, tmp_path / "cache"))
    cache = EmbeddingCache(tmp_path / "cache")
    assert cache.encoder.name == "letters"
    assert cache.encoder.template_hash == "t" * 64
    assert cache.manifest["details"]["alphabet"] == "unicode"
    np.testing.assert_array_equal(cache[5]["text"][:, 0], [ord("s"), ord("k"), ord("y")])
    assert "over 3 tokens, whose ends are cut: 7" in capsys.readouterr().err
