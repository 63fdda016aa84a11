"""The glyph embeddings, against diffusers' pipeline on the same weights."""

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import HunyuanVideo15Pipeline
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from sage_grpo_jax.text_encoders import byt5, template

PROMPTS = [
    'a "red" sign',
    "no quote",
    'the words “Größe”, "red" and "red"',
    f'a long "{"word " * 30}"',
]
MAX_TOKENS = 48  # the last is longer


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_pipeline(tmp_path_factory.mktemp("pipeline"), images=False)


@pytest.fixture(scope="module")
def expected(pipeline):
    with torch.no_grad():
        states, mask = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(
            AutoTokenizer.from_pretrained(pipeline / "tokenizer_2"),
            T5EncoderModel.from_pretrained(pipeline / "text_encoder_2"),
            PROMPTS,
            torch.device("cpu"),
            tokenizer_max_length=MAX_TOKENS,
        )
    return states.numpy(), mask.numpy()


@pytest.mark.parametrize("rows", [[0, 2, 3], [0], [2], [3]])
def test_diffusers_embeddings(pipeline, expected, rows):
    tokenizer = byt5.GlyphTokenizer(pipeline / "tokenizer_2", MAX_TOKENS)
    encoder = byt5.GlyphEncoder(pipeline / "text_encoder_2", "cpu", tokenizer.pad)
    ours = encoder(tokenizer([template.glyph_text(PROMPTS[row]) for row in rows]))
    states, mask = expected
    assert not mask[1].any()
    assert template.glyph_text(PROMPTS[1]) is None
    for row, found in zip(rows, ours, strict=True):
        length = mask[row].sum()
        assert mask[row, :length].all()
        assert found.shape == (length, tiny_models.BYT5_DIM)
        np.testing.assert_allclose(found, states[row, :length], atol=1e-5)
    assert np.abs(ours[0]).mean() > 0.1
    if rows[-1] == 3:
        assert len(ours[-1]) == MAX_TOKENS


def test_a_whole_t5_lends_its_encoder_and_half_a_one_does_not(pipeline, tmp_path):
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    config = (pipeline / "text_encoder_2" / "config.json").read_text()
    (folder / "config.json").write_text(config)
    tensors = load_file(pipeline / "text_encoder_2" / "model.safetensors")
    whole = {**tensors, "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    byt5.GlyphEncoder(folder, "cpu", 0)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing for T5EncoderModel: 1, .*block.1.*q.weight"):
        byt5.GlyphEncoder(folder, "cpu", 0)
