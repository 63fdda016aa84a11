"""Pictures and clips as files: contact sheets, grids, GIF, MP4. Frames are uint8 RGB."""

import io
import pathlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw, ImageSequence

from sage_grpo_jax.common.files import write_atomically


def write_picture(path: pathlib.Path, picture: Image.Image) -> None:
    """`write_atomically` of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def contact_sheet(
    videos: np.ndarray, captions: Sequence[str], frames: int = 6, scale: int = 3
) -> Image.Image:
    """A picture with one clip a row: `frames` of its frames, evenly spaced, and the caption.

    Args:
      videos: uint8 [N, F, H, W, 3].
      captions: N texts.
      frames: pictures a clip.
      scale: how many times to enlarge small clips.
    """
    # The sheet: per clip a line of text and a row of frames, with a gap on every side.
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
            # Not smoothed: what is judged are the pixels themselves.
            image = Image.fromarray(videos[i, frame]).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(image, (gap + column * (width * scale + gap), top + text))
    return sheet


def tile(videos: np.ndarray, columns: int) -> np.ndarray:
    """Clips side by side in a grid, with a white line between; uint8 [F, H', W', 3]."""
    count, frames, height, width, _ = videos.shape
    # One white pixel before each clip, and one at the end.
    rows = -(-count // columns)
    canvas = np.full((frames, rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, np.uint8)
    for i in range(count):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = videos[i]
    return canvas


def encode_gif(frames: np.ndarray, fps: float, scale: int = 1) -> bytes:
    """A looping GIF of uint8 frames [F, H, W, 3], each pixel enlarged `scale` times.

    GIF counts in hundredths of a second: frames last one more or less, the clip lasts F / fps.
    """
    big = _check_clip(frames, fps).repeat(scale, axis=1).repeat(scale, axis=2)
    images = [Image.fromarray(frame) for frame in big]
    # Ends are rounded, not durations, whose errors would add up over the clip.
    ends = np.round(100 * np.arange(len(frames) + 1) / fps).astype(int)
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=[10 * int(n) for n in np.diff(ends)],
        loop=0,
    )
    return buffer.getvalue()


def encode_mp4(frames: np.ndarray, fps: float, crf: int = 17) -> bytes:
    """An MP4 of uint8 frames [F, H, W, 3]: H.264, 4:2:0, BT.709, playable everywhere.

    Args:
      frames: sizes may be odd: the last line or column is then shown twice, as H.264 asks.
      fps: may be fractional, as in 23.976.
      crf: 0 to 51, lower is better; 17 is visually lossless.
    """
    import av  # video only: training writes pictures and does without

    height, width = _check_clip(frames, fps).shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # A fraction, as the container wants it: 24000 / 1001 stays exact.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"}

        # Without these marks players guess the matrix from the size of the picture.
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        stream.codec_context.color_primaries = av.video.reformatter.ColorPrimaries.BT709
        stream.codec_context.color_trc = av.video.reformatter.ColorTrc.BT709
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG

        # From here the matrix that was announced is also the one that is used.
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(picture))
        # What the encoder still holds back, for it looks ahead.
        container.mux(stream.encode())
    return buffer.getvalue()


ENCODERS = {"mp4": encode_mp4, "gif": encode_gif}


def write_clip(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    """Writes uint8 frames [F, H, W, 3] as .mp4 or .gif, under a temporary name until complete."""
    write_atomically(path, ENCODERS[path.suffix.removeprefix(".")](frames, fps))


def read_clip(path: pathlib.Path) -> np.ndarray:
    """The frames of an .mp4 or .gif as uint8 [F, H, W, 3], as a player shows them."""
    if path.suffix == ".gif":
        with Image.open(path) as image:
            return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])
    import av

    with av.open(str(path)) as container:
        pictures = container.decode(video=0)
        return np.stack([p.to_ndarray(format="rgb24", src_colorspace="ITU709") for p in pictures])


def _check_clip(frames: np.ndarray, fps: float) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames: got {frames.dtype} {frames.shape}; allowed: uint8 [F, H, W, 3], not empty"
        )
    if not 0 < fps <= 1000:
        raise ValueError(f"fps: got {fps}; allowed: greater than 0, at most 1000")
    return frames
