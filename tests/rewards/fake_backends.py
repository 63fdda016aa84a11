"""Small reward models that behave well or badly in one way each."""

import os
import sys
import threading
import time

import numpy as np

from sage_grpo_jax.rewards.backends import Backend, BackendLostError, Score


class Mean(Backend):
    """Scores the mean pixel and the mean position of red: easy to know in a test."""

    names = ("MEAN", "RED")

    def __init__(self, fingerprint: str = "mean-1"):
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self.calls = 0
        self.running = 0
        self.most_running = 0

    def fingerprint(self) -> str:
        return self._fingerprint

    def score(self, video_uint8_FxHxWx3, prompt, fps):
        with self._lock:
            self.calls += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            return self.answer(video_uint8_FxHxWx3, prompt, fps)
        finally:
            with self._lock:
                self.running -= 1

    def answer(self, video, prompt, fps):
        mean, red = float(video.mean()), float(video[..., 0].mean())
        return {"MEAN": Score(mean, mean - 100.0), "RED": Score(red, red / fps)}

    def warm_up(self):
        pass


class Slow(Mean):
    """Takes a while, or until `release` is set."""

    def __init__(self, seconds: float = 0.3, fingerprint: str = "mean-1"):
        super().__init__(fingerprint)
        self.seconds = seconds
        self.release = threading.Event()

    def answer(self, video, prompt, fps):
        self.release.wait(self.seconds)
        return super().answer(video, prompt, fps)


class Busy(Mean):
    """Computes in Python for seconds, sharing the lock of the interpreter as any code does."""

    def answer(self, video, prompt, fps):
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            sum(range(1000))
        return super().answer(video, prompt, fps)


class Bad(Mean):
    """Answers as the prompt says."""

    def answer(self, video, prompt, fps):
        good = super().answer(video, prompt, fps)
        if prompt == "lost":
            raise BackendLostError("sticky device error")
        if prompt == "raise":
            raise KeyError("no such shape")
        answers = {
            "nan": {**good, "RED": Score(1.0, float("nan"))},
            "infinite raw": {**good, "RED": Score(float("inf"), 1.0)},
            "missing": {"MEAN": good["MEAN"]},
            "extra": {**good, "BLUE": Score(0.0, 0.0)},
            "plain float": {**good, "RED": 1.0},
        }
        return answers.get(prompt, good)


class FirstAndLast(Mean):
    """Looks at two frames only."""

    def frame_indices(self, total_frames, fps):
        return (0, total_frames - 1)


class ColdFailure(Mean):
    def warm_up(self):
        raise OSError("no weights on this machine")


class NaNWarmUp(Mean):
    """Uses the warm-up that every backend inherits."""

    warm_up = Backend.warm_up

    def answer(self, video, prompt, fps):
        return {name: Score(float("nan"), 0.0) for name in self.names}


class NeverReady(Mean):
    def warm_up(self):
        time.sleep(60)


class ReportsJax(Mean):
    """Its fingerprint says whether this process has imported jax."""

    def fingerprint(self):
        return "with-jax" if "jax" in sys.modules else "without-jax"


class Dying(Mean):
    """Ends the whole process, as a crash in native code does, when the marker file is absent."""

    def answer(self, video, prompt, fps):
        marker = os.environ["DYING_MARKER"]
        if prompt == "die" and not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(139)
        return super().answer(video, prompt, fps)


def clip(seed: int = 0, frames: int = 3, side: int = 16) -> np.ndarray:
    """A random clip, uint8 [frames, side, side, 3]."""
    values = np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3))
    return values.astype(np.uint8)
