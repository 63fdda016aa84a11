"""UMT5's embeddings, against diffusers' Wan pipeline on the same weights."""

import json
import shutil
import string
import sys

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from sage_grpo_jax.text_encoders import umt5

# Prompts that mean the same with and without ftfy.
PLAIN = [
    "a cat walks on the grass",
    "",
    "a  red   dog ",
    "a " * 700,
    "<pad> it </s> <extra_id_0>",
]
# Those that ftfy mends, or is needed for to know that there is nothing to mend.
HARD = [
    "a  red\tdog \r\n\n ran",
    "a cat &amp;amp;amp;lt; dog &lt;b&gt; &nbsp; &eacute; &EACUTE; &#233; &unknown; & so",
    "&nbsp; &#13;",
    "a <b> &lt; &amp;lt; &amp;amp;lt; dog",
    "a caf\u00c3\u00a9 in Qu\u00e9bec",  # UTF-8 that was read as Latin-1
    "色调艳丽，过曝，静态",  # wide commas, of Wan's own negative prompt
    "“STOP”, ‘go’ … ﬁne e\u0301\u00a0\u3000x\u200by 🐈",
    "a bell\x07 and\x1c\x1fsome \x1b[31mred\x1b[0m \x85 line\u2028",
]
PIECES = ["&", "&amp;", "amp;", "lt;", "<", "&#x", "é", "“", "ｆ", "ﬁ", "Ã©", "â€™", "猫", "，"]
PIECES += ["\u00a0", "\u2028", "\u0301", "\ud83d"]
PLAIN_CHARACTERS = "".join(chr(code) for code in range(32, 127) if chr(code) != "&")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def wan(pipeline):
    """diffusers' pipeline, without the networks that text does not need."""
    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        vae=None,
        scheduler=None,
    )


def encode_with_diffusers(wan, prompts):
    with torch.no_grad():
        found, _ = wan.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=umt5.MAX_TOKENS
        )
    return found.float().numpy()


def open_both(pipeline, folder="text_encoder", dtype="float32"):
    tokenizer = umt5.PromptTokenizer(pipeline / "tokenizer")
    return tokenizer, umt5.PromptEncoder(pipeline / folder, dtype, "cpu", tokenizer.pad)


def assert_equal(ours, expected):
    assert len(ours) == len(expected)
    for found, padded in zip(ours, expected, strict=True):
        assert found.shape[1:] == (tiny_models.TEXT_DIM,)
        np.testing.assert_allclose(found, padded[: len(found)], atol=1e-5)
        # Beyond the prompt diffusers has zeros, and nowhere before.
        assert not padded[len(found) :].any()
        assert padded[: len(found)].any(axis=1).all()


@pytest.mark.parametrize("together", [True, False])
def test_plain_prompts(pipeline, wan, together):
    tokenizer, encoder = open_both(pipeline)
    tokens = tokenizer(PLAIN)
    assert [prompt.truncated for prompt in tokens] == [False, False, False, True, False]
    assert [len(tokens[row].ids) for row in (1, 3)] == [1, umt5.MAX_TOKENS]
    expected = encode_with_diffusers(wan, PLAIN)
    ours = encoder(tokens) if together else [encoder([prompt])[0] for prompt in tokens]
    assert_equal(ours, expected)
    # The values are no trifles next to the tolerance, and prompts differ.
    assert np.abs(ours[0]).mean() > 0.1
    assert np.abs(ours[0][0] - ours[2][0]).max() > 0.01


def test_prompts_that_need_mending(pipeline, wan):
    pytest.importorskip("ftfy")
    tokenizer, encoder = open_both(pipeline)
    assert_equal(encoder(tokenizer(HARD)), encode_with_diffusers(wan, HARD))
    assert umt5.clean(HARD[2]) == ""
    assert umt5.clean(HARD[3]) == "a <b> < < &lt; dog"
    assert umt5.clean(HARD[4]) == "a café in Québec"
    assert umt5.clean(HARD[5]) == "色调艳丽,过曝,静态"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*string.printable, *PIECES, *PIECES])).map("".join))
def test_any_text_is_cleaned_as_in_diffusers(text):
    pytest.importorskip("ftfy")
    assert umt5.clean(text) == prompt_clean(text)


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from(PLAIN_CHARACTERS)))
def test_ftfy_leaves_plain_text_alone(text):
    """What `clean` relies on where ftfy is not installed."""
    assert pytest.importorskip("ftfy").fix_text(text) == text


def test_without_ftfy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert umt5.clean(f"{PLAIN_CHARACTERS}  it's ") == f"{PLAIN_CHARACTERS[1:]} it's"
    for prompt in ("a café", "salt &amp; pepper", "two\nlines", "\x07"):
        with pytest.raises(ModuleNotFoundError, match=r"^ftfy is not installed; .*\[text\]$") as e:
            umt5.clean(prompt)
        assert repr(prompt) in str(e.value)


@pytest.mark.parametrize(("words", "truncated"), [(511, False), (512, True)])
def test_the_longest_prompt(pipeline, words, truncated):
    """A word is a token here, and the end has one."""
    (tokens,) = umt5.PromptTokenizer(pipeline / "tokenizer")(["a " * words])
    assert (len(tokens.ids), tokens.truncated) == (512, truncated)
    assert len(set(tokens.ids[:-1])) == 1
    assert tokens.ids[-1] == 1  # </s>, also where the prompt is cut


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_those_of_diffusers(pipeline, wan, dtype):
    text_encoder = UMT5EncoderModel.from_pretrained(
        pipeline / "text_encoder", dtype=getattr(torch, dtype)
    )
    rounded = WanPipeline(wan.tokenizer, text_encoder, None, None)
    expected = encode_with_diffusers(rounded, PLAIN[:3])
    exact = encode_with_diffusers(wan, PLAIN[:3])
    tokenizer, encoder = open_both(pipeline, dtype=dtype)
    ours = encoder(tokenizer(PLAIN[:3]))
    errors = [
        [np.linalg.norm(found - other[row, : len(found)]) for row, found in enumerate(ours)]
        for other in (expected, exact)
    ]
    scale = np.linalg.norm(exact[0])
    limit = {"bfloat16": 0.03, "float16": 0.01}[dtype]
    # Padding to the batch's longest rounds otherwise; it is not float32 either.
    assert max(errors[0]) < limit * scale
    assert 1e-6 * scale < max(errors[1]) < limit * scale


@pytest.mark.parametrize("layout", ["whole", "one folder", "other key", "untied"])
def test_other_files_give_the_same(pipeline, tmp_path, layout):
    """A whole UMT5; all in one folder; the other key of the embedding; Wan's own config."""
    folder = tmp_path / "text_encoder"
    if layout == "whole":
        tiny_models.save_whole_umt5(folder, pipeline / "text_encoder")
        assert any(key.startswith("decoder.") for key in load_file(folder / "model.safetensors"))
    else:
        shutil.copytree(pipeline / "text_encoder", folder)
    tokenizer_folder = pipeline / "tokenizer"
    if layout == "one folder":
        tokenizer_folder = shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    if layout == "other key":
        tensors = load_file(folder / "model.safetensors")
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if layout == "untied":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tokens = umt5.PromptTokenizer(tokenizer_folder)(PLAIN)
    original, encoder = open_both(pipeline)
    assert tokens == original(PLAIN)
    found = umt5.PromptEncoder(folder, "float32", "cpu", original.pad)(tokens)
    for ours, expected in zip(found, encoder(tokens), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_faults_are_named(pipeline, tmp_path):
    folder = shutil.copytree(pipeline / "text_encoder", tmp_path / "text_encoder")
    tensors = load_file(folder / "model.safetensors")

    def load(tensors):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        umt5.PromptEncoder(folder, "float32", "cpu", 0)

    bias = "encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"
    for key in (bias, "shared.weight"):
        absent = {name: tensor for name, tensor in tensors.items() if name != key}
        with pytest.raises(ValueError, match=r"tensors missing for UMT5EncoderModel: \d, such as"):
            load(absent)
    with pytest.raises(ValueError, match=rf"tensors misshapen .*: 1, such as {bias}"):
        load({**tensors, bias: torch.ones(8, 3)})
    with pytest.raises(ValueError, match=r"tensors unexpected .*: 1, such as adapter"):
        load({**tensors, "adapter": torch.zeros(1)})
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer: cannot be loaded"):
        umt5.PromptTokenizer(tmp_path / "tokenizer")


def test_a_tokenizer_that_gives_nothing(pipeline, tmp_path):
    folder = shutil.copytree(pipeline / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    tokenizer = umt5.PromptTokenizer(folder)
    assert len(tokenizer(["a cat"])[0].ids) > 1
    with pytest.raises(ValueError, match=r"tokenizer: prompt '  ' has no tokens"):
        tokenizer(["a cat", "  "])
