"""Scores of rewards with any names, some of them monitored only; against numpy."""

from concurrent import futures
from types import SimpleNamespace

import numpy as np
import pytest

from sage_grpo_jax.common.frozen_dict import FrozenDict
from sage_grpo_jax.config import schema
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.rewards import types
from sage_grpo_jax.training import scoring

NAN = float("nan")
REWARDS = schema.RewardsConfig(
    weights=FrozenDict(aesthetic=0.5, Motion=-2.0, clip_score=0.0, hps=0.0)
)


def columns() -> dict[str, np.ndarray]:
    """Of five samples: the third lacks an optimised reward, others lack monitored ones."""
    return {
        "aesthetic": np.float32([1.0, 2.0, 3.0, 4.0, 5.0]),
        "Motion": np.float32([0.5, 0.25, NAN, -1.0, 8.0]),
        "clip_score": np.float32([10.0, NAN, 30.0, 40.0, np.inf]),
        "hps": np.float32([NAN] * 5),
    }


def test_a_monitored_reward_takes_no_sample_out():
    scores = scoring.known_scores(columns(), REWARDS)
    np.testing.assert_array_equal(scores.valid, [True, True, False, True, True])
    np.testing.assert_array_equal(scores.values["clip_score"], [10.0, NAN, NAN, 40.0, NAN])
    np.testing.assert_array_equal(scores.values["aesthetic"], [1.0, 2.0, NAN, 4.0, 5.0])
    assert all(values.dtype == np.float32 for values in scores.values.values())
    np.testing.assert_allclose(
        scores.weighted(REWARDS.weights), [-0.5, 0.5, NAN, 4.0, -13.5], rtol=1e-6
    )


def test_every_reward_has_a_metric_over_the_samples_that_have_it():
    found = scoring.reward_metrics(scoring.known_scores(columns(), REWARDS), REWARDS)
    assert list(found) == [
        "reward/overall",
        "reward/weighted",
        "reward/aesthetic",
        "reward/motion",
        "reward/clip_score",
        "reward/hps",
        "reward/valid_fraction",
    ]
    wanted = {
        "reward/overall": np.mean([1.5, 2.25, 3.0, 13.0]),  # what is optimised, unweighted
        "reward/weighted": np.mean([-0.5, 0.5, 4.0, -13.5]),
        "reward/aesthetic": 3.0,
        "reward/motion": np.mean([0.5, 0.25, -1.0, 8.0]),
        "reward/clip_score": 25.0,
        "reward/hps": NAN,
        "reward/valid_fraction": 0.8,
    }
    assert found == pytest.approx(wanted, nan_ok=True)


def test_samples_without_a_number_are_taken_out_of_everything():
    scores = scoring.known_scores(columns(), REWARDS).without(np.arange(5) == 3)
    np.testing.assert_array_equal(scores.valid, [True, True, False, False, True])
    np.testing.assert_array_equal(scores.values["clip_score"], [10.0, NAN, NAN, NAN, NAN])
    assert scoring.reward_metrics(scores, REWARDS)["reward/valid_fraction"] == 0.6
    nobody = scores.without(np.ones(5, bool))
    found = scoring.reward_metrics(nobody, REWARDS)
    assert found.pop("reward/valid_fraction") == 0
    assert all(np.isnan(value) for value in found.values())


class Answers:
    """A scorer with an answer for each sample."""

    def __init__(self, results) -> None:
        self.results, self.prompts = results, []

    def submit(self, video, prompt, request_id, fps):
        self.prompts.append((request_id, prompt, fps, int(video.max())))
        future: futures.Future = futures.Future()
        future.set_result(self.results[int(request_id.rpartition("/")[2])])
        return future


@pytest.fixture
def make_scoring(monkeypatch):
    """make_scoring(results) -> (a `Scoring` of REWARDS whose scorer gives them, that scorer)."""
    monkeypatch.setattr(scoring.plan_lib, "decode_batch", lambda config, mesh: 1)

    def make(results):
        scorer = Answers(results)
        config = SimpleNamespace(rewards=REWARDS, video=SimpleNamespace(fps=6.0))
        programs = SimpleNamespace(plan=SimpleNamespace(config=config), mesh=None)
        return scoring.Scoring(programs, None, scorer), scorer

    return make


def scored(**scores: float) -> types.RewardResult:
    return types.RewardResult(True, types.OK, scores=scores)


def test_answers_are_read_by_name_and_others_ignored(make_scoring):
    """In whatever order they come; what the service gives and no weight names is not looked at."""
    full = {"hps": 4.0, "blur": 99.0, "Motion": 2.0, "aesthetic": 1.0, "clip_score": 3.0}
    some = {"Motion": 6.0, "aesthetic": 5.0}  # without what is monitored
    less = {"Motion": 7.0, "clip_score": 8.0, "hps": 9.0}
    failed = types.RewardResult(False, types.INTERNAL, "on demand")
    results = [scored(**full), scored(**some), scored(**less), failed]
    videos = np.arange(4, dtype=np.uint8)[:, None, None, None, None] * np.ones(
        (1, 2, 8, 8, 3), np.uint8
    )
    names = [f"id {i}" for i in range(4)]
    text = np.zeros((4, 1, 1), np.float32)
    samples = conditions.PromptBatch(names, ["a", "b", "c", "d"], text, np.ones((4, 1), bool))

    made, scorer = make_scoring(results)
    found = made.score_videos(videos, samples, "eval0")
    np.testing.assert_array_equal(found.valid, [True, True, False, False])
    wanted = {
        "aesthetic": [1.0, 5.0, NAN, NAN],
        "Motion": [2.0, 6.0, NAN, NAN],
        "clip_score": [3.0, NAN, NAN, NAN],
        "hps": [4.0, NAN, NAN, NAN],
    }
    assert list(found.values) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found.values[name], values)
    assert scorer.prompts == [(f"eval0/id {i}/{i}", "abcd"[i], 6.0, i) for i in range(4)]


def test_another_model_is_no_failed_sample(make_scoring):
    changed = types.RewardResult(False, types.FAILED_PRECONDITION, "another fingerprint")
    made, _ = make_scoring([scored(aesthetic=1.0, Motion=1.0), changed])
    text = np.zeros((2, 1, 1), np.float32)
    samples = conditions.PromptBatch(["a", "b"], ["a", "b"], text, np.ones((2, 1), bool))
    with pytest.raises(scoring.RewardModelChangedError, match="nothing was applied"):
        made.score_videos(np.zeros((2, 2, 8, 8, 3), np.uint8), samples, "step0")
