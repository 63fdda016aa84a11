"""The rewards put real clips first, fall with every degradation, and survive any input."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy import ndimage

from sage_grpo_jax.rewards.backends import moving_shapes as backend
from sage_grpo_jax.worlds.moving_shapes import spec
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes

COUNT = 16
BACKEND = backend.MovingShapesBackend()


@pytest.fixture(scope="module")
def parameters():
    return moving_shapes.sample_parameters(jax.random.key(21), COUNT, "all")


@pytest.fixture(scope="module")
def clips(parameters):
    return moving_shapes.to_uint8(moving_shapes.render(parameters))


@pytest.fixture(scope="module")
def captions(parameters):
    return moving_shapes.captions(parameters)


def scores(videos, captions) -> dict[str, np.ndarray]:
    """Normalised scores by reward name, [N] each."""
    results = [BACKEND.score(v, c, 8.0) for v, c in zip(videos, captions, strict=True)]
    return {name: np.array([r[name].normalised for r in results]) for name in BACKEND.names}


def pixels(videos):
    return np.round(np.clip(videos, 0, 1) * 255).astype(np.uint8)


def noise(clips, level):
    return pixels(clips / 255 + level * np.random.default_rng(0).standard_normal(clips.shape))


def blur(clips, sigma):
    return pixels(ndimage.gaussian_filter(clips / 255, (0, 0, sigma, sigma, 0)))


def shift(clips, offset_NxFx2):
    """Moves the content of every frame by (x, y) pixels."""
    moved = [
        ndimage.shift(frame, (y, x, 0), order=1, mode="nearest")
        for clip, offsets in zip(clips / 255, offset_NxFx2, strict=True)
        for frame, (x, y) in zip(clip, offsets, strict=True)
    ]
    return pixels(np.reshape(moved, clips.shape))


def jitter(clips, level):
    return shift(clips, level * np.random.default_rng(1).standard_normal((*clips.shape[:2], 2)))


def slow_down(clips, share, parameters):
    """Takes a share of the captioned motion away."""
    step = spec.DIRECTION_XY[np.asarray(parameters.direction)]
    step = step * spec.PIXELS_PER_FRAME[np.asarray(parameters.speed)][:, None]
    return shift(clips, -share * (np.arange(17) - 8)[None, :, None] * step[:, None])


def flicker(clips, level):
    sign = np.where(np.arange(17) % 2, 1, -1)[:, None, None, None]
    return pixels(clips / 255 * (1 + level * sign))


def tint(clips, share, parameters):
    """Moves the colour of the shape towards the next one of the palette."""
    ground = clips[:, :1, :1, :1] / 255
    old = spec.COLOUR_RGB[np.asarray(parameters.colour)][:, None, None, None] / 255
    new = spec.COLOUR_RGB[(np.asarray(parameters.colour) + 1) % 6][:, None, None, None] / 255
    contrast = old - ground
    cover = ((clips / 255 - ground) * contrast).sum(-1, keepdims=True) / (contrast**2).sum(
        -1, keepdims=True
    )
    return pixels(ground + cover * (old + share * (new - old) - ground))


# Degradation, increasing levels, the rewards that fall with it.
LADDERS = {
    "faint noise": (noise, (0.005, 0.01, 0.02), ("VQ",)),
    "noise": (noise, (0.05, 0.1, 0.2, 0.4), ("VQ", "MQ", "TA")),
    "blur": (blur, (0.5, 0.7, 1.0, 1.5, 3.0), ("VQ", "TA")),
    "jitter": (jitter, (0.1, 0.3, 1.0, 2.0), ("MQ",)),
    "slow_down": (slow_down, (0.1, 0.3, 0.7, 1.0, 2.0), ("MQ",)),
    "flicker": (flicker, (0.03, 0.1, 0.3), ("VQ", "MQ", "TA")),
    "tint": (tint, (0.1, 0.3, 0.6, 1.0), ("TA",)),
}


@pytest.mark.parametrize("name", LADDERS)
def test_scores_fall_with_every_step_of_a_degradation(parameters, clips, captions, name):
    degrade, levels, rewards = LADDERS[name]
    extra = (parameters,) if name in ("slow_down", "tint") else ()
    before = scores(clips, captions)
    for level in levels:
        after = scores(degrade(clips, level, *extra), captions)
        for reward in rewards:
            assert after[reward].mean() < before[reward].mean(), (level, reward)
        before = after


def test_normalised_is_in_standard_deviations(clips, captions, monkeypatch):
    video = np.asarray(clips[0])
    raw = {n: s.raw for n, s in BACKEND.score(video, captions[0], 8.0).items()}
    # A mean and a deviation from which every score of this clip is 2.5 deviations away.
    deviations = {"VQ": 0.2, "MQ": 1.0, "TA": 3.0}
    table = {name: (raw[name] - 2.5 * std, std) for name, std in deviations.items()}
    monkeypatch.setattr(backend, "NORMALISATION", table)
    for score in BACKEND.score(video, captions[0], 8.0).values():
        assert score.normalised == pytest.approx(2.5, rel=1e-6)


def test_overall_of_real_clips_is_above_every_degradation(parameters, clips, captions):
    real = sum(scores(clips, captions).values())
    degraded = {
        "noise": noise(clips, 0.05),
        "blur": blur(clips, 0.7),
        "jitter": jitter(clips, 0.5),
        "half speed": slow_down(clips, 0.5, parameters),
        "reversed": clips[:, ::-1],
        "shuffled": clips[:, np.random.default_rng(3).permutation(17)],
        "still": np.repeat(clips[:, 8:9], 17, 1),
        "flicker": flicker(clips, 0.1),
        "another colour": tint(clips, 1.0, parameters),
        "empty": np.broadcast_to(clips[:, :1, :1, :1], clips.shape),
    }
    for name, videos in degraded.items():
        overall = sum(scores(videos, captions).values())
        assert (overall < real - 1).all(), name


@pytest.mark.parametrize(
    ("word", "rewards"),
    [
        ("colour", ("TA",)),
        ("shape", ("TA",)),
        ("direction", ("MQ", "TA")),
        ("speed", ("MQ",)),
        ("size", ("TA",)),
        ("background", ("TA",)),
    ],
)
def test_another_caption_lowers_only_what_it_says(clips, captions, word, rewards):
    choices = getattr(spec.CHOICES, word)
    swapped = []
    for text in captions:
        words = spec.parse_caption(text)
        other = choices[(choices.index(getattr(words, word)) + 1) % len(choices)]
        swapped.append(spec.caption(words._replace(**{word: other})))
    true, false = scores(clips, captions), scores(clips, swapped)
    for reward in BACKEND.names:
        if reward in rewards:
            assert (false[reward] < true[reward] - 0.3).all()
        else:
            np.testing.assert_allclose(false[reward], true[reward], atol=0.15)


def test_every_frame_of_another_shape_costs_the_first_as_much_as_any(parameters, clips, captions):
    """Frames of a clip that differs in its shape alone: the same place, colour and motion."""
    other = parameters._replace(shape=(parameters.shape + 1) % 3)
    others = moving_shapes.to_uint8(moving_shapes.render(other))

    def with_frames(rows):
        mixed = clips.copy()
        mixed[:, rows] = others[:, rows]
        return mixed

    def identity(videos):
        errors = [backend.measure(v, c, 8.0) for v, c in zip(videos, captions, strict=True)]
        return np.array([e["identity"] for e in errors])

    real = identity(clips)
    assert real.max() < 0.05
    counts = [identity(with_frames(np.arange(n))) for n in (1, 2, 5, 9, 17)]
    for fewer, more in zip([real, *counts], counts, strict=False):
        assert (more > fewer).all()
    places = np.stack([identity(with_frames([t])) for t in (0, 8, 16)])
    assert (places > 0.1).all()
    np.testing.assert_allclose(places / places[1], 1, atol=0.25)
    # One frame is worth a clear part of what training can gain; the palette does not see it.
    true, one = scores(clips, captions), scores(with_frames([0]), captions)
    assert (one["TA"] < true["TA"] - 0.3).all()
    np.testing.assert_allclose(one["VQ"], true["VQ"], atol=0.15)


def test_vq_is_blind_to_the_caption(clips, captions):
    np.testing.assert_array_equal(
        scores(clips, captions)["VQ"], scores(clips, captions[1:] + captions[:1])["VQ"]
    )


def test_a_foreign_outline_moves_well_and_does_not_look_well():
    """A crisp diamond, which is no shape of the world, moving as told: MQ cannot know."""
    x = np.arange(32) + 0.5 - (9.3 + 0.4 * np.arange(17)[:, None, None])
    y = np.arange(32)[:, None] + 0.5 - 15.7
    cover = np.clip(0.5 - (np.abs(x) + np.abs(y) - 7) / np.sqrt(2), 0, 1)[..., None]
    ground, red = spec.BACKGROUND_RGB[0] / 255, spec.COLOUR_RGB[0] / 255
    diamond = pixels(ground + cover * (red - ground))[None]
    text = ["a large red square moves right, slowly, over a dark background"]
    key = jax.random.key(0)
    real = moving_shapes.render(moving_shapes.parameters_from_captions(text, key))
    fooled, true = scores(diamond, text), scores(moving_shapes.to_uint8(real), text)
    # 0.306 in raw units: wrong pixels cost several times as much.
    assert fooled["MQ"] > true["MQ"] - 0.306 / backend.NORMALISATION["MQ"][1]
    for name in ("VQ", "TA"):
        assert fooled[name] < true[name] - 1
    assert moving_shapes.manifold_distance(diamond)[0] > 0.03


def test_small_improvements_near_perfect_still_count(clips, captions):
    """No plateau: a tenth less of a slight error raises its reward for nearly every clip."""
    for degrade, reward, level in ((noise, "VQ", 0.01), (blur, "VQ", 0.6), (jitter, "MQ", 0.2)):
        worse = scores(degrade(clips, level), captions)[reward]
        better = scores(degrade(clips, 0.9 * level), captions)[reward]
        assert (better > worse).mean() > 0.9


@pytest.mark.parametrize("value", ["black", "white", "grey", "noise", "frames", "speck"])
def test_any_pixels_have_finite_scores_far_below_real_clips(clips, captions, value):
    rng = np.random.default_rng(0)
    video = {
        "black": np.zeros((17, 32, 32, 3)),
        "white": np.full((17, 32, 32, 3), 255),
        "grey": np.full((17, 32, 32, 3), 128),
        "noise": rng.integers(0, 256, (17, 32, 32, 3)),
        "frames": np.broadcast_to(rng.integers(0, 256, (17, 1, 1, 3)), (17, 32, 32, 3)),
        "speck": np.pad(np.full((1, 1, 1, 3), 255), ((8, 8), (31, 0), (0, 31), (0, 0))),
    }[value].astype(np.uint8)
    worst = min(sum(s) for s in zip(*scores(clips, captions).values(), strict=True))
    for caption in captions[:4]:
        result = BACKEND.score(video, caption, 8.0)
        assert all(np.isfinite(score).all() for score in result.values())
        assert sum(score.normalised for score in result.values()) < worst - 10


def test_speeds_are_pixels_a_second(clips, captions):
    """Every second frame at half the frame rate shows the same motion."""
    full = scores(clips, captions)["MQ"]
    half = [
        BACKEND.score(v[::2], c, 4.0)["MQ"].normalised for v, c in zip(clips, captions, strict=True)
    ]
    np.testing.assert_allclose(half, full, atol=0.3)


def test_normalisation_and_terms(clips, captions):
    score = BACKEND.score(clips[0], captions[0], 8.0)
    errors = backend.measure(clips[0], captions[0], 8.0)
    assert set(errors) == set(backend.TERMS)
    assert tuple(score) == BACKEND.names
    for name, (mean, std) in backend.NORMALISATION.items():
        assert score[name].normalised == pytest.approx((score[name].raw - mean) / std)
        terms = [(errors[k], t) for k, t in backend.TERMS.items() if t.reward == name]
        raw = sum(-t.weight * np.log(error + t.floor) for error, t in terms)
        assert score[name].raw == pytest.approx(raw)


def test_fingerprint_follows_the_constants(monkeypatch):
    before = BACKEND.fingerprint()
    assert before == backend.MovingShapesBackend().fingerprint()
    assert len(before) == 64
    monkeypatch.setitem(backend.NORMALISATION, "VQ", (0.0, 2.0))
    assert BACKEND.fingerprint() != before


@pytest.mark.parametrize(
    ("video", "prompt", "fps", "match"),
    [
        (np.zeros((17, 32, 32, 3), np.uint8), "a disk", 8.0, "caption 'a disk' does not read"),
        (np.zeros((1, 32, 32, 3), np.uint8), spec.example_caption(), 8.0, "video has shape"),
        (np.zeros((17, 48, 32, 3), np.uint8), spec.example_caption(), 8.0, "video has shape"),
        (np.zeros((17, 32, 32, 3), np.float32), spec.example_caption(), 8.0, "type float32"),
        (np.zeros((17, 32, 32, 3), np.uint8), spec.example_caption(), 0.0, "fps is 0.0"),
    ],
)
def test_bad_input_is_refused(video, prompt, fps, match):
    with pytest.raises(ValueError, match=match):
        BACKEND.score(video, prompt, fps)


def test_warm_up_runs():
    BACKEND.warm_up()


def test_backend_does_not_import_jax():
    code = (
        "import sys, sage_grpo_jax.rewards.backends.moving_shapes; sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
