"""Every error that the rewards are made of, in clips for which it is known by arithmetic."""

import numpy as np
import pytest

from sage_grpo_jax.rewards.backends import moving_shapes as backend

CAPTION = "a large red square moves right, slowly, over a dark background"
RED, DARK = np.array([230, 38, 38]), np.array([38, 38, 38])
HALF = 5.4  # of the side of a large square
TIME = np.arange(17)[:, None]
TOLD = np.array([0.4, 0.0])  # pixels a frame


def path(step=TOLD, offsets=0.0):
    """Centres [17, 2] around the middle of the frame."""
    return 16.0 + (TIME - 8) * np.asarray(step) + offsets


def clip(centres, half=HALF, colour=RED, ground=DARK, cover=1.0, offset=0):
    """A square with one-pixel edges; uint8 [17, 32, 32, 3]."""
    x = np.arange(32) + 0.5 - centres[:, 0, None, None]
    y = np.arange(32)[:, None] + 0.5 - centres[:, 1, None, None]
    half = np.broadcast_to(half, 17)[:, None, None]
    alpha = np.clip(0.5 - (np.maximum(abs(x), abs(y)) - half), 0, 1)[..., None] * cover
    frames = ground + alpha * (np.asarray(colour) - ground) + offset
    return np.round(np.clip(frames, 0, 255)).astype(np.uint8)


def errors(video):
    return backend.measure(video, CAPTION, 8.0)


def distance(a, b):
    return np.sqrt(np.mean((np.asarray(a) - b) ** 2)) / 255


def test_a_perfect_clip_has_none():
    for name, value in errors(clip(path())).items():
        assert value < 0.03, name


def jitter_case():
    offsets = 0.8 * np.random.default_rng(0).standard_normal((17, 2))
    slope = (TIME - 8).T @ offsets / np.sum((TIME - 8) ** 2)
    rest = offsets - offsets.mean(0) - (TIME - 8) * slope
    return clip(path(offsets=offsets)), np.sqrt((rest**2).sum(1).mean())


def unsteady_case():
    half = np.where(np.arange(17) % 2, 3.6, 5.4)
    area, spread = (2 * half) ** 2, half * np.sqrt(2 / 3)
    return clip(path(), half), np.hypot(area.std() / (area.mean() + 1), np.log(spread + 1).std())


# A square of 10 x 10 whole pixels, half covered: the rim differs from its neighbours by one half.
SOFT = (64 + 36 * 0.5) / (4 * np.sqrt(50 + 10))
# name of the error -> (clip, its value)
CASES = {
    "velocity": (clip(path((0.7, -0.2))), np.hypot(0.3, 0.2)),
    "jitter": jitter_case(),
    "unsteadiness": unsteady_case(),
    "colour": (clip(path(), colour=(200, 60, 100)), distance((200, 60, 100), RED)),
    "background": (clip(path(), ground=np.array([70, 70, 70])), 32 / 255),
    "size": (clip(path(), 3.6), np.log((10.8**2 + 1) / (7.2**2 + 1))),
    "direction": (clip(path((0.0, -0.4))), 0.5),
    # The smallest shape of the world is a triangle, the largest a square.
    "presence": (clip(path(), 2.0), np.log((27**0.5 * (0.7 * 4) ** 2 + 1) / (16 + 1))),
    "palette": (clip(path(), offset=np.array([0, 10, -10])), distance((0, 10, -10), 0)),
    "softness": (clip(path((0, 0)), 5.0, cover=0.5), SOFT),
}


@pytest.mark.parametrize("name", CASES)
def test_value_of_an_error(name):
    video, wanted = CASES[name]
    assert errors(video)[name] == pytest.approx(wanted, rel=0.04)


def test_opposite_directions_are_as_wrong_as_can_be():
    assert errors(clip(path((-0.4, 0.0))))["direction"] > 0.99


def test_too_large_is_no_better_than_too_small():
    wanted = np.log((18.0**2 + 1) / (10.8**2 + 1))
    assert errors(clip(path((0, 0)), 9.0))["presence"] == pytest.approx(wanted, rel=0.02)


def test_every_error_has_a_case():
    """But for those of the outline, which `moving_shapes_backend_test.py` looks at."""
    assert set(backend.TERMS) == {*CASES, "shape", "identity", "outline"}


@pytest.mark.parametrize("name", backend.TERMS)
def test_terms_reward_what_is_better_in_their_own_reward(name, monkeypatch):
    """Twice the error costs its weight times the logarithm, and nothing else changes."""
    video, term = clip(path()), backend.TERMS[name]
    plain = errors(video)
    monkeypatch.setattr(backend, "measure", lambda *args: plain)
    before = backend.MovingShapesBackend().score(video, CAPTION, 8.0)
    worse = {**plain, name: 2 * plain[name] + 0.1}
    monkeypatch.setattr(backend, "measure", lambda *args: worse)
    after = backend.MovingShapesBackend().score(video, CAPTION, 8.0)
    cost = term.weight * np.log((worse[name] + term.floor) / (plain[name] + term.floor))
    for reward in backend.MovingShapesBackend.names:
        lost = before[reward].raw - after[reward].raw
        assert lost == pytest.approx(cost if reward == term.reward else 0.0, abs=1e-9)
