"""Pictures and clips read back from their files."""

import io
import os

import av
import numpy as np
import pytest
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


def _moving_square(height: int, width: int) -> np.ndarray:
    """A coloured square on a gradient, a few pixels further in each frame; uint8 [6, H, W, 3]."""
    frames = np.zeros((6, height, width, 3), np.uint8)
    frames[..., 2] = np.linspace(40, 200, width).astype(np.uint8)
    for f in range(6):
        frames[f, 8:24, 4 + 4 * f : 20 + 4 * f] = (220, 60, 30)
    return frames


@pytest.mark.parametrize(("height", "width"), [(48, 64), (33, 47)])
def test_mp4_holds_the_frames(tmp_path, height, width):
    frames, path = _moving_square(height, width), tmp_path / "clip.mp4"
    media.write_clip(path, frames, fps=23.976)
    shown = media.read_clip(path)
    assert shown.shape == (6, height + height % 2, width + width % 2, 3)
    difference = np.abs(shown[:, :height, :width].astype(int) - frames)
    # Chroma has half the resolution: only pixels at the square's edges are far off.
    assert difference.mean() < 3
    assert np.median(difference) <= 1
    inside = difference[:, 12:20, 30:31][[3]]  # red there in frame 3 alone
    assert inside.max() < 12
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(23.976, abs=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_an_interrupted_write_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        media.write_clip(tmp_path / "clip.gif", _moving_square(32, 32), fps=8.0)
    assert not (tmp_path / "clip.gif").exists()


def test_gif_is_read_back_and_lasts_as_long_as_the_clip(tmp_path):
    frames, path = _moving_square(32, 48), tmp_path / "clip.gif"
    media.write_clip(path, frames, fps=24.0)
    shown = media.read_clip(path)
    assert np.abs(shown.astype(int) - frames).max() < 16
    with Image.open(path) as image:
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
    assert sum(durations) == 250
    assert set(durations) == {40, 50}


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 8, 8, 3)), 8.0, "float64"),
        (np.zeros((0, 8, 8, 3), np.uint8), 8.0, "not empty"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0.0, "fps: got 0.0"),
    ],
)
def test_what_is_no_clip_is_refused(frames, fps, message):
    for encode in media.ENCODERS.values():
        with pytest.raises(ValueError, match=message):
            encode(frames, fps)


def test_captions_in_any_script_are_drawn():
    sheet = media.contact_sheet(_clips(1), ["猫 “naïve” кот 🐈"], frames=2)
    assert np.asarray(sheet).min() < 255
