"""The condition latents of image-to-video: a clean first frame, and a mask that says so."""

import numpy as np


def condition_latents(image_latents: np.ndarray, frames: int) -> np.ndarray:
    """What is concatenated to the noisy latents along channels.

    The same as `prepare_cond_latents_and_mask` of diffusers' image-to-video pipeline, channels
    last: the first latent frame holds the image, the others zeros; the last channel is 1 at the
    first frame and 0 after it.

    Args:
      image_latents: [P, 1, h, w, C], scaled, as in the embedding cache.
      frames: T, latent frames of the clip.

    Returns:
      [P, T, h, w, C + 1], in the type of the latents.

    Raises:
      ValueError: latents of another rank or with more than one frame; frames below 1.
    """
    if image_latents.ndim != 5 or image_latents.shape[1] != 1:
        raise ValueError(f"image_latents has shape {image_latents.shape}; allowed: [P, 1, h, w, C]")
    if frames < 1:
        raise ValueError(f"frames is {frames}; allowed: at least 1")
    prompts, _, height, width, channels = image_latents.shape
    condition = np.zeros((prompts, frames, height, width, channels + 1), image_latents.dtype)
    condition[:, :1, ..., :channels] = image_latents
    condition[:, 0, ..., channels] = 1
    return condition
