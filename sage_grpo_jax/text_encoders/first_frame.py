"""The first frame of image-to-video: vision features from SigLIP, latents from the VAE.

Both see the image at the clip's size, scaled to cover it and cropped at the centre, as in
diffusers' `pipeline_hunyuan_video1_5_image2video.py`.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sage_grpo_jax import weights
from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import AutoencoderConfig
from sage_grpo_jax.text_encoders import torch_support


def open_image(path: pathlib.Path) -> Image.Image:
    """An image file as RGB, upright.

    Raises:
      ValueError: no such file, or none that can be decoded.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such image") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scales an image to cover height x width, and cuts what sticks out, equally on both sides."""
    # Whole numbers, rounded down as in diffusers: the crop must not move by a pixel.
    across = width * image.height > image.width * height  # the width decides the scale
    scaled_width = width if across else image.width * height // image.height
    scaled_height = image.height * width // image.width if across else height
    scaled = image.resize((scaled_width, scaled_height), resample=Image.Resampling.LANCZOS)
    left, top = scaled_width // 2 - width // 2, scaled_height // 2 - height // 2
    return scaled.crop((left, top, left + width, top + height))


class ImageEncoder:
    """SigLIP's vision model.

    Raises:
      ValueError: a folder that holds another model, or tensors that do not fit.
    """

    def __init__(
        self, folder: pathlib.Path, processor: pathlib.Path, dtype: str, device: str
    ) -> None:
        torch, transformers = torch_support.load_libraries()
        # The processor on PIL is the one that the model was released with; the one on torchvision
        # scales images a little differently. Older transformers have it under the plain name.
        name = "SiglipImageProcessorPil"
        loader = getattr(transformers, name, None) or transformers.SiglipImageProcessor
        self._processor = torch_support.load_processor(loader, processor)
        self._model = torch_support.load_model(
            transformers.SiglipVisionModel,
            folder,
            dtype,
            device,
            unused=("text_model.", "logit_"),
        )
        self._dtype, self._device = getattr(torch, dtype), device

    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """Features of a batch: f32[N, D] each, the last hidden state."""
        torch, _ = torch_support.load_libraries()
        pixels = self._processor.preprocess(
            images=list(images), do_resize=True, do_convert_rgb=True, return_tensors="pt"
        )["pixel_values"]
        with torch.inference_mode():
            states = self._model(pixels.to(self._device, self._dtype)).last_hidden_state
        return [torch_support.to_numpy(row) for row in states]


def check_size(folder: pathlib.Path, height: int | None, width: int | None) -> AutoencoderConfig:
    """The config of the VAE that is to encode frames of a size.

    Raises:
      ValueError: a folder that holds another model; a size that is missing or does not divide.
    """
    config = weights.load_config(folder)
    if registry.kind_of(config) != registry.AUTOENCODER:
        raise ValueError(f"vae={folder}: holds a {registry.of(config).NAME}; allowed: a VAE")
    ratio = config.spatial_compression_ratio
    for field, value in (("height", height), ("width", width)):
        if value is None or value < 1 or value % ratio:
            raise ValueError(f"{field}={value}: must be a positive multiple of {ratio}")
    return config


def open_latent_encoder(folder: pathlib.Path) -> Callable[[Image.Image], np.ndarray]:
    """The VAE as a function: an image of the clip's size -> scaled latents f32[1, h, w, C].

    Latents are the mode of the posterior in the units of the transformer, in float32.
    """
    config = weights.load_config(folder)
    vae = registry.of(config)
    params = {"encoder": weights.load(folder, config)["encoder"]}  # lets go of the decoder
    encode = jax.jit(functools.partial(vae.encode, config=config))

    def latents(image: Image.Image) -> np.ndarray:
        # [H, W, 3] in 0..255 becomes [1, 1, H, W, 3] in -1..1, a clip of one frame.
        pixels = np.asarray(image, np.float32)[None, None] / 255 * 2 - 1
        mean, _ = encode(params, jnp.asarray(pixels))
        return np.asarray(vae.to_model_latents(mean[0], config))

    return latents
