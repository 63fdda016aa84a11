"""The first frame's features, latents and condition, against diffusers' image-to-video pipeline."""

import shutil

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from diffusers.utils import load_image
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from sage_grpo_jax.models import hunyuan_video_condition
from sage_grpo_jax.text_encoders import first_frame

HEIGHT, WIDTH = 32, 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Higher, wider and equal to the clip; the last is turned by its EXIF tag."""
    folder = tmp_path_factory.mktemp("images")
    sizes = [(90, 61), (50, 200), (HEIGHT, WIDTH), (17, 33)]
    paths = [
        tiny_models.save_image(folder / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)
    ]
    turned = Image.open(paths[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn
    turned.save(folder / "turned.jpg", exif=exif)
    return [*paths, folder / "turned.jpg"]


@pytest.fixture(scope="module")
def theirs(pipeline):
    """diffusers' pipeline class, without the networks that images do not need."""
    pipe = object.__new__(HunyuanVideo15ImageToVideoPipeline)
    pipe.vae = AutoencoderKLHunyuanVideo15.from_pretrained(pipeline / "vae").eval()
    pipe.video_processor = HunyuanVideo15ImageProcessor(
        vae_scale_factor=tiny_models.VAE_RATIO, do_resize=False, do_convert_rgb=True
    )
    return pipe


def resized_by_diffusers(theirs, path):
    return theirs.video_processor.resize(
        load_image(str(path)), height=HEIGHT, width=WIDTH, resize_mode="crop"
    )


def ours_resized(path):
    return first_frame.fit_image(first_frame.open_image(path), HEIGHT, WIDTH)


def test_images_are_scaled_and_cropped_as_in_diffusers(theirs, images):
    for path in images:
        expected = resized_by_diffusers(theirs, path)
        assert expected.size == (WIDTH, HEIGHT)
        np.testing.assert_array_equal(np.asarray(ours_resized(path)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_other_kinds_of_images(theirs, images, tmp_path, mode):
    Image.open(images[0]).convert(mode).save(tmp_path / "x.png")
    expected = resized_by_diffusers(theirs, tmp_path / "x.png")
    np.testing.assert_array_equal(ours_resized(tmp_path / "x.png"), np.asarray(expected))


def test_features_are_diffusers(pipeline, theirs, images):
    encoder = first_frame.ImageEncoder(
        pipeline / "image_encoder", pipeline / "feature_extractor", "float32", "cpu"
    )
    ours = encoder([ours_resized(path) for path in images])
    model = SiglipVisionModel.from_pretrained(pipeline / "image_encoder")
    processor = SiglipImageProcessorPil.from_pretrained(pipeline / "feature_extractor")
    for path, found in zip(images, ours, strict=True):
        with torch.no_grad():
            expected = theirs._get_image_embeds(
                model, processor, resized_by_diffusers(theirs, path), CPU
            )
        assert found.shape == (tiny_models.IMAGE_TOKENS, tiny_models.IMAGE_DIM)
        np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-5)
    assert np.abs(ours[0] - ours[1]).max() > 0.05


def test_released_names_of_tensors(pipeline, images, tmp_path):
    """Released weights were saved by an older transformers, under `vision_model.`."""
    folder = shutil.copytree(pipeline / "image_encoder", tmp_path / "image_encoder")
    tensors = load_file(folder / "model.safetensors")
    released = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in tensors.items()}
    save_file(released, folder / "model.safetensors", {"format": "pt"})
    found = [
        first_frame.ImageEncoder(model, pipeline / "feature_extractor", "float32", "cpu")(
            [ours_resized(images[0])]
        )[0]
        for model in (folder, pipeline / "image_encoder")
    ]
    np.testing.assert_array_equal(*found)


def test_latents_and_condition_are_diffusers(pipeline, theirs, images):
    encode = first_frame.open_latent_encoder(pipeline / "vae")
    ours = np.stack([encode(ours_resized(path)) for path in images])
    h, w = HEIGHT // tiny_models.VAE_RATIO, WIDTH // tiny_models.VAE_RATIO
    frames = 3
    noisy = torch.zeros(1, tiny_models.LATENT_DIM, frames, h, w)
    conditions = hunyuan_video_condition.condition_latents(ours, frames)
    assert conditions.shape == (len(images), frames, h, w, tiny_models.LATENT_DIM + 1)
    for path, latents, condition in zip(images, ours, conditions, strict=True):
        with torch.no_grad():
            parts = theirs.prepare_cond_latents_and_mask(
                noisy, resized_by_diffusers(theirs, path), 1, HEIGHT, WIDTH, torch.float32, CPU
            )
        expected = torch.cat(parts, dim=1)[0].permute(1, 2, 3, 0).numpy()
        np.testing.assert_allclose(latents[0], expected[0, ..., :-1], atol=1e-5)
        np.testing.assert_allclose(condition, expected, atol=1e-5)
        assert np.abs(latents).mean() > 0.05


def test_faults_are_named(pipeline, images, tmp_path):
    with pytest.raises(ValueError, match=r"none.png: no such image"):
        first_frame.open_image(tmp_path / "none.png")
    (tmp_path / "half.png").write_bytes(images[0].read_bytes()[:200])
    with pytest.raises(ValueError, match=r"half.png: cannot be read as an image"):
        first_frame.open_image(tmp_path / "half.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png: cannot be read as an image"):
        first_frame.open_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"height=30: must be a positive multiple of 8"):
        first_frame.check_size(pipeline / "vae", 30, 48)
    with pytest.raises(ValueError, match=r"width=None: must be a positive multiple of 8"):
        first_frame.check_size(pipeline / "vae", 32, None)
    with pytest.raises(ValueError, match="image_latents has shape"):
        hunyuan_video_condition.condition_latents(np.zeros((1, 2, 4, 4, 3)), 3)
    with pytest.raises(ValueError, match="frames is 0"):
        hunyuan_video_condition.condition_latents(np.zeros((1, 1, 4, 4, 3)), 0)
