"""Small random encoders in the layout of a diffusers pipeline, and a tokenizer trained here."""

import json
import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

TEXT_DIM, BYT5_DIM, IMAGE_DIM, LATENT_DIM, VAE_RATIO = 16, 12, 20, 4, 8
IMAGE_TOKENS = 9
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen's chat format.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "a cat walks on the grass, realistic",
    "You are a helpful assistant. Describe the video",
    "system user assistant",
    "the main content, motion and colour of the objects",
]


def build_pipeline(root: pathlib.Path, images: bool = True) -> pathlib.Path:
    """A folder with every encoder; without `images` only those of text."""
    torch.manual_seed(0)
    _save_tokenizer(root / "tokenizer")
    _randomise(Qwen2_5_VLTextModel(text_config())).save_pretrained(root / "text_encoder")
    # The released tokenizer has more tokens than bytes: colours and fonts.
    ByT5Tokenizer(extra_ids=5).save_pretrained(root / "tokenizer_2")
    config = T5Config(
        vocab_size=300, d_model=BYT5_DIM, d_kv=4, d_ff=16, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    _randomise(T5EncoderModel(config)).save_pretrained(root / "text_encoder_2")
    if images:
        _save_image_encoder(root)
    return root


def text_config() -> Qwen2_5_VLTextConfig:
    return Qwen2_5_VLTextConfig(
        vocab_size=400, hidden_size=TEXT_DIM, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )  # fmt: skip


def save_whole_qwen(folder: pathlib.Path, text_encoder: pathlib.Path) -> None:
    """Qwen2.5-VL with vision tower and head around the text model of a pipeline."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": TEXT_DIM, "fullatt_block_indexes": [0]}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text_config().to_dict(), vision_config=vision)
    model = Qwen2_5_VLForConditionalGeneration(config)
    text = Qwen2_5_VLTextModel.from_pretrained(text_encoder)
    model.model.language_model.load_state_dict(text.state_dict())
    model.save_pretrained(folder)


def build_wan_pipeline(root: pathlib.Path) -> pathlib.Path:
    """A folder with Wan's text encoder and its tokenizer."""
    torch.manual_seed(1)
    _save_sentence_pieces(root / "tokenizer")
    _randomise(UMT5EncoderModel(umt5_config())).save_pretrained(root / "text_encoder")
    return root


def umt5_config() -> UMT5Config:
    """Like Wan's own: an encoder-decoder's, which claims that embeddings are not tied."""
    return UMT5Config(
        vocab_size=400, d_model=TEXT_DIM, d_kv=4, d_ff=24, num_layers=3, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def save_whole_umt5(folder: pathlib.Path, text_encoder: pathlib.Path) -> None:
    """UMT5 with decoder and head around the encoder of a pipeline."""
    model = _randomise(UMT5ForConditionalGeneration(umt5_config()))
    encoder = UMT5EncoderModel.from_pretrained(text_encoder)
    model.load_state_dict(encoder.state_dict(), strict=False)
    model.save_pretrained(folder)


def _save_sentence_pieces(folder: pathlib.Path) -> None:
    """T5's tokenizer with pieces of its own."""
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = T5Tokenizer().backend_tokenizer.pre_tokenizer
    corpus = [*CORPUS, "größer, café; 猫在草地上走 & <b>", "0123456789"]
    tokenizer.train_from_iterator(corpus, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=4).save_pretrained(folder)


def _save_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True)
    tokenizer.model.save(str(folder))
    merges = (folder / "merges.txt").read_text().splitlines()
    pairs = [tuple(line.split(" ")) for line in merges if not line.startswith("#")]
    Qwen2Tokenizer(
        vocab=tokenizer.get_vocab(),
        merges=pairs,
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def _save_image_encoder(root: pathlib.Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=24, patch_size=8,
    )  # fmt: skip
    _randomise(SiglipVisionModel(config)).save_pretrained(root / "image_encoder")
    SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(
        root / "feature_extractor"
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_DIM, block_out_channels=(8, 16, 32, 32), layers_per_block=1,
        spatial_compression_ratio=VAE_RATIO,
    )  # fmt: skip
    _randomise(vae, 0.01).save_pretrained(root / "vae")


def _randomise(model: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Noise on what is initialised to constants, which would hide a mistake; larger weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def save_image(path: pathlib.Path, height: int, width: int, seed: int = 0) -> pathlib.Path:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path
