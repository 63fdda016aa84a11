"""Pictures and clips as files: contact sheets, grids, GIF, MP4. Frames are uint8 RGB."""

import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes to a temporary name, then renames: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_picture(path: pathlib.Path, picture: Image.Image) -> None:
    """`write_atomically` of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def contact_sheet(videos: np.ndarray, captions: Sequence[str], frames: int = 6, scale: int = 3):
    """A picture with one clip a row: `frames` of its frames, evenly spaced, and the caption.

    Args:
      videos: uint8 [N, F, H, W, 3].
      captions: N texts.
      frames: pictures a clip.
      scale: how many times to enlarge small clips.
    """
    count, total, height, width, _ = videos.shape
    chosen = np.linspace(0, total - 1, min(frames, total)).round().astype(int)
    gap, text = 4, 14
    row = height * scale + gap + text
    sheet = Image.new(
        "RGB", ((width * scale + gap) * len(chosen) + gap, row * count + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i in range(count):
        top = i * row + gap
        draw.text((gap, top), captions[i], fill="black")
        for column, frame in enumerate(chosen):
            image = Image.fromarray(videos[i, frame]).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(image, (gap + column * (width * scale + gap), top + text))
    return sheet


def tile(videos: np.ndarray, columns: int) -> np.ndarray:
    """Clips side by side in a grid, with a white line between; uint8 [F, H', W', 3]."""
    count, frames, height, width, _ = videos.shape
    rows = -(-count // columns)
    canvas = np.full((frames, rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, np.uint8)
    for i in range(count):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = videos[i]
    return canvas


def encode_gif(frames: np.ndarray, fps: float, scale: int = 1) -> bytes:
    """A looping GIF of uint8 frames [F, H, W, 3], each pixel enlarged `scale` times."""
    big = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    images = [Image.fromarray(frame) for frame in big]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
    )
    return buffer.getvalue()
