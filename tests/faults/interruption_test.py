"""SIGTERM in every phase of a run, and what `kill -9` leaves: the rerun ends with the same bits."""

import os
import signal
from concurrent import futures

import pytest

from sage_grpo_jax.training import checkpoint, evaluation, metrics, scoring
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training.blueprint import Blueprint

# What is running when the signal arrives, and the call of it (from 1) that is interrupted.
PHASES = {
    "rollout": (learner_lib.Learner, "window_starts", 2),
    "decode": (scoring.Scoring, "_own_rows", 4),
    "scoring": (scoring.Scoring, "_submit", 11),
    "advantages": (learner_lib.Learner, "advantages", 2),
    "update": (learner_lib.Learner, "update", 2),
    "first evaluation": (scoring.Scoring, "score_videos", 1),
    # Before the first and after the last step the test prompts are scored too.
    "evaluation in between": (scoring.Scoring, "score_videos", 3),
    "last evaluation": (scoring.Scoring, "score_videos", 4),
    "samples": (evaluation, "save_samples", 2),
    "metrics": (metrics.MetricsWriter, "write", 2),
    "saving": (checkpoint.Checkpoints, "save", 1),
    "loading weights": (Blueprint, "load_vae", 1),
}


class Interrupting:
    """Sends this process a signal inside the n-th call of a function."""

    def __init__(self, monkeypatch, owner, name: str, number: int) -> None:
        self.calls = 0
        original = getattr(owner, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


SLOW = (1, 8, 9, 13, 16, 20, 24, 25, 32)


class Waiting:
    """A scorer whose answers take long enough for a signal to be noticed while they are awaited."""

    fingerprint = "local"

    def __init__(self, scorer) -> None:
        self._scorer = scorer
        self.never: set[int] = set()
        self.calls = 0

    def submit(self, *args):
        """See `learner.Scorer`."""
        self.calls += 1
        if self.calls in self.never:
            os.kill(os.getpid(), signal.SIGTERM)
            return futures.Future()
        return self._scorer.submit(*args)


QUICK = ("decode", "evaluation in between")


@pytest.mark.parametrize(
    "phase", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PHASES]
)
def test_sigterm_in_every_phase_loses_nothing(runs, straight, tmp_path, monkeypatch, phase):
    owner, name, number = PHASES[phase]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupting = Interrupting(patch, owner, name, number)
        summary = runs.train(tmp_path / "run")
        assert interrupting.calls >= number
    assert signal.getsignal(signal.SIGTERM) == before
    if phase not in ("last evaluation", "saving"):
        assert summary is None
    assert runs.train(tmp_path / "run")["steps"] == 3
    runs.assert_same(tmp_path / "run", straight)


# 4 scores a step, 4 an evaluation after steps 0, 2 and 3, and 4 of the test prompts at both ends:
# the first and the last score of the run, of a step in the middle, of an evaluation.
@pytest.mark.parametrize("call", [10, 17, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])
def test_sigterm_while_a_reward_is_awaited_loses_nothing(runs, straight, tmp_path, call):
    local, runs.scorer = runs.scorer, Waiting(runs.scorer)
    runs.scorer.never = {call}
    assert runs.train(tmp_path / "run") is None
    runs.scorer = local
    assert runs.train(tmp_path / "run")["steps"] == 3
    runs.assert_same(tmp_path / "run", straight)
