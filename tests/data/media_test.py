"""Pictures and clips read back from their files."""

import io

import numpy as np
from PIL import Image

from sage_grpo_jax.data import media


def _clips(count: int) -> np.ndarray:
    """Clips whose frame f of clip i is filled with the grey 10·i + f."""
    grey = 10 * np.arange(count)[:, None] + np.arange(5)
    return np.broadcast_to(grey[:, :, None, None, None], (count, 5, 8, 8, 3)).astype(np.uint8)


def test_contact_sheet_shows_evenly_spaced_frames():
    sheet = np.asarray(media.contact_sheet(_clips(2), ["a", "b"], frames=3, scale=2))
    assert sheet.shape[1] == 3 * (16 + 4) + 4
    row = sheet[4 + 14 + 8]
    assert [row[4 + 8 + i * 20][0] for i in range(3)] == [0, 2, 4]


def test_tile_puts_clips_beside_each_other():
    grid = media.tile(_clips(3), columns=2)
    assert grid.shape == (5, 19, 19, 3)
    assert [grid[4, 5, 5, 0], grid[4, 5, 14, 0], grid[4, 14, 5, 0]] == [4, 14, 24]
    assert (grid[:, 0] == 255).all()


def test_gif_holds_the_frames(tmp_path):
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    frames[np.arange(4), np.arange(4), 0] = (255, 0, 0)
    image = Image.open(io.BytesIO(media.encode_gif(frames, fps=8.0, scale=2)))
    assert (image.n_frames, image.size, image.info["duration"]) == (4, (16, 16), 120)
    for number in range(4):
        image.seek(number)
        shown = np.asarray(image.convert("RGB"))[::2, ::2]
        np.testing.assert_array_equal(shown, frames[number])
