"""Where encoders are looked for, and when two of them count as the same."""

import shutil

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from transformers import Qwen2_5_VLTextModel

from sage_grpo_jax.text_encoders import model_folders, qwen


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize(
    ("find", "model", "processor"),
    [
        (model_folders.find_text_encoder, "text_encoder", "tokenizer"),
        (model_folders.find_byt5, "text_encoder_2", "tokenizer_2"),
        (model_folders.find_image_encoder, "image_encoder", "feature_extractor"),
    ],
)
def test_three_ways_to_lay_out_an_encoder(pipeline, tmp_path, find, model, processor):
    expected = (pipeline / model, pipeline / processor)
    assert find(str(pipeline)) == expected
    assert find(str(pipeline / model)) == expected
    shutil.copytree(pipeline / model, tmp_path / "one")
    shutil.copytree(pipeline / processor, tmp_path / "one", dirs_exist_ok=True)
    assert find(str(tmp_path / "one")) == (tmp_path / "one", tmp_path / "one")
    # Without what prepares the input, the message says where it was looked for.
    shutil.copytree(pipeline / model, tmp_path / "alone" / model)
    with pytest.raises(ValueError, match=rf"alone: no .*config.json or .*{processor}/.*json"):
        find(str(tmp_path / "alone"))


def test_the_vae_is_found(pipeline):
    assert model_folders.find_vae(str(pipeline)) == pipeline / "vae"
    assert model_folders.find_vae(str(pipeline / "vae")) == pipeline / "vae"


def test_fingerprints(pipeline, tmp_path):
    original = pipeline / "text_encoder"
    first = model_folders.fingerprint(original)
    copy = shutil.copytree(original, tmp_path / "copy")
    assert model_folders.fingerprint(copy) == first
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"more": np.zeros(3, np.float32)}, copy / "model.safetensors")
    assert model_folders.fingerprint(copy) != first
    shutil.copy(original / "model.safetensors", copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert model_folders.fingerprint(copy) != first
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"copy: no \*.safetensors"):
        model_folders.fingerprint(copy)

    tokenizer = shutil.copytree(pipeline / "tokenizer", tmp_path / "tokenizer")
    first = model_folders.processor_fingerprint(tokenizer)
    assert first == model_folders.processor_fingerprint(pipeline / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    assert model_folders.processor_fingerprint(tokenizer) != first


def test_shards_are_one_model(pipeline, tmp_path):
    """As the released text encoder is: several files and their index."""
    model = Qwen2_5_VLTextModel.from_pretrained(pipeline / "text_encoder")
    model.save_pretrained(tmp_path / "text_encoder", max_shard_size="10KB")
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 2
    tokenizer = qwen.PromptTokenizer(pipeline / "tokenizer")
    found = [
        qwen.PromptEncoder(
            folder / "text_encoder", "float32", "cpu", tokenizer.crop_start, tokenizer.pad
        )(tokenizer(["a cat"]))[0]
        for folder in (pipeline, tmp_path)
    ]
    np.testing.assert_array_equal(*found)
    first = model_folders.fingerprint(tmp_path / "text_encoder")
    next((tmp_path / "text_encoder").glob("*.safetensors")).unlink()
    assert model_folders.fingerprint(tmp_path / "text_encoder") != first
    with pytest.raises(ValueError, match="cannot be loaded as Qwen2_5_VLTextModel"):
        qwen.load_language_model(tmp_path / "text_encoder", "float32", "cpu")
