"""The language model's embeddings, against diffusers' pipeline on the same weights."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import HunyuanVideo15Pipeline
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLTextModel

from sage_grpo_jax.text_encoders import qwen

PROMPTS = ["a cat walks", "", 'a "red" dog on the grass', "The main content. " * 20, "“STOP”"]
MAX_TOKENS = 40  # the fourth prompt is longer


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_pipeline(tmp_path_factory.mktemp("pipeline"), images=False)


@pytest.fixture(scope="module")
def tokenizer(pipeline):
    return qwen.PromptTokenizer(pipeline / "tokenizer", MAX_TOKENS)


@pytest.fixture(scope="module")
def expected(pipeline, tokenizer):
    """Embeddings and masks [5, MAX_TOKENS, ...] of diffusers."""
    with torch.no_grad():
        states, mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
            Qwen2_5_VLTextModel.from_pretrained(pipeline / "text_encoder"),
            AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
            PROMPTS,
            torch.device("cpu"),
            tokenizer_max_length=MAX_TOKENS,
            crop_start=tokenizer.crop_start,
        )
    return states.numpy(), mask.numpy()


def open_encoder(pipeline, tokenizer, folder="text_encoder", dtype="float32"):
    return qwen.PromptEncoder(pipeline / folder, dtype, "cpu", tokenizer.crop_start, tokenizer.pad)


def assert_equal(ours, expected, rows):
    states, mask = expected
    for row, found in zip(rows, ours, strict=True):
        length = mask[row].sum()
        assert mask[row, :length].all()  # padded at the right
        assert found.shape == (length, tiny_models.TEXT_DIM)
        np.testing.assert_allclose(found, states[row, :length], atol=1e-5)


def test_a_batch_gives_diffusers_embeddings(pipeline, tokenizer, expected):
    tokens = tokenizer(PROMPTS)
    assert [prompt.truncated for prompt in tokens] == [False, False, False, True, False]
    ours = open_encoder(pipeline, tokenizer)(tokens)
    assert_equal(ours, expected, range(5))
    assert len(ours[3]) == MAX_TOKENS
    # The values are no trifles next to the tolerance, and prompts differ.
    assert np.abs(ours[0]).mean() > 0.1
    assert np.abs(ours[0][0] - ours[4][0]).max() > 0.01


@pytest.mark.parametrize("row", range(5))
def test_one_prompt_at_a_time(pipeline, tokenizer, expected, row):
    ours = open_encoder(pipeline, tokenizer)(tokenizer(PROMPTS[row : row + 1]))
    assert_equal(ours, expected, [row])


def test_the_last_two_layers_and_the_norm_are_left_out(pipeline, tokenizer):
    """The layer counted by hand: what layer 2 of 0..3 is given."""
    model = Qwen2_5_VLTextModel.from_pretrained(pipeline / "text_encoder")
    given = []
    model.layers[2].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    tokens = tokenizer(["a cat walks"])
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens[0].ids]))
    (ours,) = open_encoder(pipeline, tokenizer)(tokens)
    np.testing.assert_allclose(ours, given[0][0, tokenizer.crop_start :].numpy(), atol=1e-5)


def test_the_crop_is_the_template_and_nothing_more(pipeline, tokenizer):
    plain = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    tokens = tokenizer(["a cat"])[0].ids
    head = plain.decode(tokens[: tokenizer.crop_start])
    assert head.endswith("used in the video.<|im_end|>\n<|im_start|>user\n")
    tail = plain.decode(tokens[tokenizer.crop_start :])
    assert tail == "a cat<|im_end|>\n<|im_start|>assistant\n"


def test_bfloat16_is_near_float32(pipeline, tokenizer, expected):
    ours = open_encoder(pipeline, tokenizer, dtype="bfloat16")(tokenizer(PROMPTS))
    for row, found in enumerate(ours):
        reference = expected[0][row, : len(found)]
        error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
        assert 1e-4 < error < 0.03  # 8 bits, a few layers; not float32 either


@pytest.mark.parametrize("spelling", ["model.layers", "model.language_model.layers"])
def test_a_whole_qwen_folder_gives_the_same(pipeline, tokenizer, expected, tmp_path, spelling):
    tiny_models.save_whole_qwen(tmp_path / "whole", pipeline / "text_encoder")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith("visual.") for name in tensors)
    if "language_model" in spelling:
        tensors = {
            name.replace("model.", "model.language_model.", 1)
            if name.startswith("model.")
            else name.replace("visual.", "model.visual.", 1): tensor
            for name, tensor in tensors.items()
        }
        save_file(tensors, file, {"format": "pt"})
    assert any(name.startswith(spelling) for name in tensors)
    encoder = open_encoder(tmp_path, tokenizer, "whole")
    assert not any("visual" in name for name, _ in encoder._model.named_parameters())
    assert_equal(encoder(tokenizer(PROMPTS)), expected, range(5))


def test_faults_are_named(pipeline, tokenizer, tmp_path):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    config = json.loads((pipeline / "text_encoder" / "config.json").read_text())
    tensors = load_file(pipeline / "text_encoder" / "model.safetensors")

    def load(config, tensors):
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        open_encoder(tmp_path, tokenizer)

    absent = {k: v for k, v in tensors.items() if k != "layers.0.mlp.up_proj.weight"}
    with pytest.raises(
        ValueError, match=r"tensors missing .*: 1, such as layers.0.mlp.up_proj.weight"
    ):
        load(config, absent)
    with pytest.raises(ValueError, match=r"tensors unexpected .*: 1, such as adapter"):
        load(config, {**tensors, "adapter": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model_type is 't5'; allowed: qwen2_5_vl_text"):
        load({**config, "model_type": "t5"}, tensors)
    with pytest.raises(ValueError, match=r"2 layers; at least 3 needed"):
        load({**config, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, tensors)
    with pytest.raises(ValueError, match=r"tensors misshapen .*: 1, such as .*norm.weight"):
        load(config, {**tensors, "norm.weight": torch.ones(3)})
    (folder / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"cannot be loaded as Qwen2_5_VLTextModel"):
        open_encoder(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no chat template"),
        (("'<|im_start|>'", "'### '"), "the chat template puts .* before the prompt"),
    ],
)
def test_other_templates_are_refused(pipeline, tmp_path, change, message):
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    tokenizer.chat_template = change and tokenizer.chat_template.replace(*change)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        qwen.PromptTokenizer(tmp_path)


def test_a_prompt_that_melts_into_the_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_head", [*tokenizer._head[:-1], 0])
    with pytest.raises(ValueError, match="prompt 'a cat' does not start after"):
        tokenizer(["a cat"])
