"""What an evaluation leaves in `samples/`: one clip a prompt in pictures, all rewards as JSON."""

import json

import numpy as np
import pytest

from sage_grpo_jax.data import media
from sage_grpo_jax.training import evaluation


def test_pictures_show_the_first_sample_of_the_first_prompts(make_config, tmp_path, monkeypatch):
    config = make_config({"eval.sheet_prompts": 3, "video.fps": 6.0})
    videos = np.arange(8, dtype=np.uint8)[:, None, None, None, None] * np.ones(
        (8, 5, 32, 32, 3), np.uint8
    )
    prompts = [f"prompt {i // 2}" for i in range(8)]
    scores = {
        "VQ": np.array([0.5, 9, 1.5, 9, 2.5, 9, 9, np.nan]),
        "TA": np.array([0.25, 9, -2.0, 9, np.nan, 9, 9, 9]),
    }
    found = {}

    def sheet(shown, captions, **kwargs):
        found["sheet"], found["captions"] = shown[:, 0, 0, 0, 0].tolist(), captions
        return media.Image.new("RGB", (2, 2))

    def gif(frames, fps, scale):
        found["gif"], found["fps"] = sorted(set(np.unique(frames)) - {255}), fps
        return b"GIF"

    monkeypatch.setattr(media, "contact_sheet", sheet)
    monkeypatch.setattr(media, "encode_gif", gif)
    result = evaluation.Evaluation("eval", {}, videos, prompts, scores)
    assert evaluation.save_samples(result, tmp_path, "step_7", config) == b"GIF"
    assert found["sheet"] == [0, 2, 4]
    assert found["captions"] == ["prompt 0   +0.75", "prompt 1   -0.50", "prompt 2   +nan"]
    assert found["gif"] == [0, 2, 4]
    assert found["fps"] == 6.0
    assert (tmp_path / "samples" / "step_7.gif").read_bytes() == b"GIF"
    written = json.loads((tmp_path / "samples" / "step_7.json").read_text())
    assert written["prompts"] == prompts
    assert written["optimised"] == ["VQ", "TA"]
    assert written["rewards"]["VQ"] == [0.5, 9, 1.5, 9, 2.5, 9, 9, None]
    assert written["rewards"]["TA"][4] is None
    assert written["rewards"]["TA"][2] == pytest.approx(-2.0)


def test_a_monitored_reward_is_written_and_not_summed(make_config, tmp_path, monkeypatch):
    config = make_config({"eval.sheet_prompts": 2, "rewards.weights.MQ": 0.0})
    scores = {"VQ": np.array([1.0, 2.0]), "MQ": np.array([50.0, np.nan])}
    videos, captions = np.zeros((2, 5, 32, 32, 3), np.uint8), []

    def sheet(shown, texts, **kwargs):
        captions.extend(texts)
        return media.Image.new("RGB", (2, 2))

    monkeypatch.setattr(media, "contact_sheet", sheet)
    result = evaluation.Evaluation("eval", {}, videos, ["a", "b"], scores)
    evaluation.save_samples(result, tmp_path, "step_0", config)
    assert captions == ["a   +1.00", "b   +2.00"]
    written = json.loads((tmp_path / "samples" / "step_0.json").read_text())
    assert written["rewards"] == {"VQ": [1.0, 2.0], "MQ": [50.0, None]}
    assert written["optimised"] == ["VQ"]
