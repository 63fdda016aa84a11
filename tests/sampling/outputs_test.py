"""Names, record and contact sheet of an output folder."""

import json

import numpy as np
import pytest
from PIL import Image

from sage_grpo_jax.data import media
from sage_grpo_jax.sampling import outputs

PROMPTS = [("a red/disk", "a red disk"), ("000002", "two words"), ("Кот и 猫!", "cats")]


def test_names_hold_number_id_and_seed():
    names = [sample.name for sample in outputs.plan(PROMPTS, [0, 7])]
    assert names[:3] == ["000_a_red_disk_seed0", "000_a_red_disk_seed7", "001_000002_seed0"]
    assert names[5] == "002_кот_и_猫_seed7"
    many = outputs.plan([("x" * 300, "text")] * 1001, [0])
    assert many[1000].name == f"1000_{'x' * 80}_seed0"
    assert many[5].name.startswith("0005_")
    assert outputs.slug("???") == "prompt"
    assert outputs.slug("猫" * 50) == "猫" * 26  # whole characters within 80 bytes


def _touch(out, sample, *suffixes):
    for suffix in suffixes:
        (out / f"{sample.name}.{suffix}").touch()


def test_a_clip_is_finished_with_its_record_and_all_its_files(tmp_path):
    first, second, *_ = outputs.plan(PROMPTS, [0])
    records = outputs.Records(tmp_path, {"steps": 4, "size": (3, 4)})
    _touch(tmp_path, first, "mp4")
    assert not records.finished(first, ("mp4",))
    records.add([(second, True), (first, False)], ("mp4", "gif"))
    again = outputs.Records(tmp_path, {"steps": 4, "size": (3, 4)})
    assert again.finished(first, ("mp4",))
    assert not again.finished(first, ("mp4", "gif"))
    assert not again.finished(second, ("mp4",))
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "file": "000_a_red_disk_seed0.mp4",
        "prompt": "a red disk",
        "id": "a red/disk",
        "seed": 0,
        "settings": {"steps": 4, "size": [3, 4]},
        "also": ["000_a_red_disk_seed0.gif"],
        "finite": False,
    }
    assert [row["id"] for row in rows] == ["a red/disk", "000002"]


def test_other_settings_and_other_prompts_are_refused(tmp_path):
    (sample,) = outputs.plan([("1", "a")], [0])
    outputs.Records(tmp_path, {"steps": 4, "shift": 5.0}).add([(sample, True)], ("mp4",))
    with pytest.raises(ValueError, match=r"other settings: eta was None, is 1; steps was 4, is 8"):
        outputs.Records(tmp_path, {"steps": 8, "shift": 5.0, "eta": 1})
    (edited,) = outputs.plan([("1", "b")], [0])
    with pytest.raises(ValueError, match="made for the prompt 'a', it is now 'b'"):
        outputs.Records(tmp_path, {"steps": 4, "shift": 5.0}).finished(edited, ("mp4",))


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "x"}',
        '{"file": "x", "id": "1", "prompt": "a", "seed": 0, "settings": []}',
        '{"file": 3, "id": "1", "prompt": "a", "seed": 0, "settings": {}}',
        '{"file": "x", "id": "1", "prompt": "a", "seed": 1e400, "settings": {}}',
        "[" * 100_000,
        "null",
    ],
)
def test_a_damaged_record_is_named(line, tmp_path):
    (tmp_path / "samples.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1: not the record of a sample"):
        outputs.Records(tmp_path, {})


def test_the_sheet_shows_the_clips_that_are_here(tmp_path):
    samples = outputs.plan(PROMPTS, [0])
    outputs.write_sheet(tmp_path, samples, "gif")
    assert not (tmp_path / "contact_sheet.png").exists()
    for sample, grey in zip(samples[1:], (50, 200), strict=True):
        clip = np.full((4, 64, 512, 3), grey, np.uint8)
        clip[..., 0] += np.arange(4, dtype=np.uint8)[:, None, None]  # no two frames are equal
        media.write_clip(tmp_path / f"{sample.name}.gif", clip, 8.0)
    outputs.write_sheet(tmp_path, samples, "gif")
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB"))
    # Two rows of six pictures, made smaller to 256 × 32, then enlarged to at least 96 lines.
    assert sheet.shape[:2] == (2 * (96 + 18) + 4, 6 * (768 + 4) + 4)
    assert [int(sheet[y, 400, 1]) for y in (60, 180)] == [50, 200]
