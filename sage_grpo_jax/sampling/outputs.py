"""The output folder: names of the clips, what is finished, the record, the contact sheet.

    000_a_red_disk_seed0.mp4   number of the prompt, its id, the seed
    samples.jsonl              one object a clip: file, prompt, id, seed, settings
    contact_sheet.png          frames of the first clips

A clip is finished when it has its file and its line; both appear whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sage_grpo_jax.common import checked_json, files
from sage_grpo_jax.data import media

RECORDS = "samples.jsonl"
SHEET = "contact_sheet.png"
_SLUG_BYTES = 80
_SHEET_CLIPS, _SHEET_FRAMES = 16, 6
# Pictures of a sheet are at most this wide: six of them fit on a screen.
_SHEET_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Sample:
    """One clip to be made."""

    prompt: int  # row of the prompt
    id: str
    text: str
    seed: int
    name: str  # of its files, without suffix


def plan(prompts: Sequence[tuple[str, str]], seeds: Sequence[int]) -> list[Sample]:
    """All clips, prompt by prompt.

    Args:
      prompts: (id, text) in the order of the file.
      seeds: of every prompt.
    """
    # As many digits as the last prompt needs, so that files sorted by name are in order.
    digits = max(3, len(str(len(prompts) - 1)))
    return [
        Sample(row, name, text, seed, f"{row:0{digits}d}_{slug(name)}_seed{seed}")
        for row, (name, text) in enumerate(prompts)
        for seed in seeds
    ]


def slug(name: str) -> str:
    """A prompt id as part of a file name: letters and digits of any script, "_" between them."""
    words = re.sub(r"[^\w]+", "_", name.lower()).strip("_")
    # Cut in bytes, as file systems count, and never within a character.
    return words.encode()[:_SLUG_BYTES].decode(errors="ignore") or "prompt"


class Records:
    """samples.jsonl: what is finished, and how it was made.

    Args:
      out: the output folder.
      settings: all that decides how a clip looks, JSON values.

    Raises:
      ValueError: a damaged file, or clips that were made with other settings.
    """

    def __init__(self, out: pathlib.Path, settings: dict[str, Any]) -> None:
        self._out, self._path = out, out / RECORDS
        # As they are read back (tuples become lists), so that they compare equal.
        self._settings = json.loads(json.dumps(settings))
        self._rows: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            for number, line in enumerate(self._path.read_text().splitlines(), start=1):
                row = self._parse(line, number)
                self._rows[row["file"]] = row

    def __len__(self) -> int:
        """How many clips are recorded."""
        return len(self._rows)

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        where = f"{self._path}, line {number}"
        try:
            row = checked_json.parse(line)
            made = checked_json.member(row, "settings", dict)
            for field, hint in (("file", str), ("id", str), ("prompt", str), ("seed", int)):
                checked_json.member(row, field, hint)
        except ValueError as error:
            raise ValueError(f"{where}: not the record of a sample ({error})") from error

        # Clips of two settings in one folder could not be told apart by their names.
        names = sorted(set(made) | set(self._settings))
        differing = [
            f"{name} was {made.get(name)!r}, is {self._settings.get(name)!r}"
            for name in names
            if made.get(name) != self._settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"--out: {self._out} holds clips that were made with other settings: "
                f"{'; '.join(differing)}. Allowed: the same settings, or another folder"
            )
        return row

    def finished(self, sample: Sample, suffixes: Sequence[str]) -> bool:
        """Whether the clip has its record and all its files.

        Raises:
          ValueError: another prompt was recorded under this name.
        """
        row = self._rows.get(f"{sample.name}.{suffixes[0]}")
        if row is None:
            return False
        if (row["id"], row["prompt"]) != (sample.id, sample.text):
            raise ValueError(
                f"--out: {row['file']} in {self._out} was made for the prompt {row['prompt']!r}, "
                f"it is now {sample.text!r}; allowed: the same prompts, or another folder"
            )
        return all((self._out / f"{sample.name}.{suffix}").exists() for suffix in suffixes)

    def add(self, samples: Iterable[tuple[Sample, bool]], suffixes: Sequence[str]) -> None:
        """Records clips whose files are complete; (sample, whether all its values are finite)."""
        for sample, finite in samples:
            row = {
                "file": f"{sample.name}.{suffixes[0]}",
                "prompt": sample.text,
                "id": sample.id,
                "seed": sample.seed,
                "settings": self._settings,
            }
            if len(suffixes) > 1:
                row["also"] = [f"{sample.name}.{suffix}" for suffix in suffixes[1:]]
            if not finite:
                row["finite"] = False
            self._rows[row["file"]] = row

        # Written whole and in one order: a run that was stopped ends with the same file.
        rows = sorted(self._rows.values(), key=lambda row: row["file"])
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_atomically(self._path, text.encode())


def write_sheet(out: pathlib.Path, samples: Sequence[Sample], suffix: str) -> None:
    """The contact sheet of the first clips whose files are here."""
    # Of what is there: the first clips, since nobody has chosen them.
    shown = [s for s in samples if (out / f"{s.name}.{suffix}").exists()][:_SHEET_CLIPS]
    if not shown:
        return
    clips = np.stack([_thumbnails(media.read_clip(out / f"{s.name}.{suffix}")) for s in shown])
    captions = [f"{s.text}   (seed {s.seed})" for s in shown]
    scale = max(1, 96 // clips.shape[2])
    media.write_picture(
        out / SHEET, media.contact_sheet(clips, captions, frames=_SHEET_FRAMES, scale=scale)
    )


def _thumbnails(clip: np.ndarray) -> np.ndarray:
    """A few frames of a clip, evenly spaced, made smaller where they are large."""
    rows = np.linspace(0, len(clip) - 1, _SHEET_FRAMES).round().astype(int)
    height, width = clip.shape[1:3]
    if width <= _SHEET_WIDTH:
        return clip[rows]
    size = (_SHEET_WIDTH, round(height * _SHEET_WIDTH / width))
    return np.stack([np.asarray(Image.fromarray(clip[row]).resize(size)) for row in rows])
