"""The evaluation: fixed prompts, fixed seeds, the ODE sampler; numbers, sheets and animations."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from sage_grpo_jax.common import files
from sage_grpo_jax.config import schema
from sage_grpo_jax.data import media
from sage_grpo_jax.flow import noise
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.rewards import names as reward_names
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import scoring as scoring_lib


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    split: str  # "eval" or "test"
    metrics: dict[str, float]  # names start with the split
    videos: np.ndarray  # uint8 [N, F, H, W, 3]
    prompts: list[str]
    scores: dict[str, np.ndarray]  # reward -> [N]; NaN where it failed


def evaluate(
    learner: learner_lib.Learner,
    params: Any,
    prompts: conditions.PromptBatch,
    split: str = "eval",
) -> Evaluation:
    """Samples, scores and measures evaluation or test prompts.

    The noise depends on `eval.seed`, prompt and sample only, so every evaluation of a run (and of
    another run) starts from the same noise.

    Args:
      learner: gives programs and scorer.
      params: the policy's parameters.
      prompts: N prompts, `eval.samples_per_prompt` of each already repeated.
      split: what the names of the metrics start with, "eval" or "test".
    """
    config = learner.config
    size = config.batch_size
    count = len(prompts.ids)

    # The noise is that of rollout 0 and slot 0 of the evaluation's seed, at every step of the run.
    # Samples of one prompt are told apart by how often the prompt came before.
    occurrence = _occurrence(prompts.ids)
    keys = noise.sample_keys(
        config.eval.seed,
        0,
        np.zeros(count, np.uint32),
        np.array([noise.prompt_hash(i) for i in prompts.ids], np.uint32),
        occurrence,
    )

    # Clips and rewards, batch by batch
    videos, parts = [], []
    for start in range(0, count, size):
        # The last batch is filled up with its own samples: one shape, one compilation.
        rows = np.arange(start, start + size) % count
        batch = prompts.take(rows)
        videos.append(learner.scoring.decode(learner.sample(params, batch, keys[rows])))
        parts.append(learner.scoring.score_videos(videos[-1], batch, f"eval{start}"))

    # What they say; the rows that filled up the last batch are cut off again
    videos = np.concatenate(videos)[:count]
    scores = scoring_lib.Scores(
        {n: np.concatenate([p.values[n] for p in parts])[:count] for n in parts[0].values},
        np.concatenate([p.valid for p in parts])[:count],
    )
    found = {
        **_reward_metrics(config, scores, prompts.ids),
        **_diversity(videos, prompts.ids),
        **_world_metrics(config, videos, prompts.prompts),
    }
    metrics = {f"{split}/{name}": value for name, value in found.items()}
    return Evaluation(split, metrics, videos, prompts.prompts, scores.values)


def _occurrence(ids: list[str]) -> np.ndarray:
    """How often each id came before: the sample number; uint32 [N]."""
    seen: dict[str, int] = {}
    numbers = []
    for name in ids:
        numbers.append(seen.get(name, 0))
        seen[name] = numbers[-1] + 1
    return np.array(numbers, np.uint32)


def _groups(ids: list[str]) -> list[np.ndarray]:
    """The rows of every prompt, in the order of first appearance."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, []).append(row)
    return [np.array(group) for group in rows.values()]


def _reward_metrics(
    config: schema.Config, scores: scoring_lib.Scores, ids: list[str]
) -> dict[str, float]:
    """Mean rewards with their standard errors over the prompts, where there are several.

    Samples of one prompt are alike, so that the error is that of the prompts' means.
    """
    found = scoring_lib.reward_metrics(scores, config.rewards)
    columns = {"reward/overall": scores.weighted(dict.fromkeys(config.rewards.optimised, 1.0))}
    columns |= {reward_names.metric(name): values for name, values in scores.values.items()}

    for name, values in columns.items():
        # A prompt whose samples all failed says nothing; of the others every prompt counts once,
        # however many of its samples have the reward.
        groups = [group[np.isfinite(values[group])] for group in _groups(ids)]
        means = np.array([values[group].mean() for group in groups if len(group)])
        if len(means) > 1:
            error = means.std(ddof=1) / len(means) ** 0.5
            found[f"{name}{reward_names.ERROR_SUFFIX}"] = float(error)
    return found


def _diversity(videos: np.ndarray, ids: list[str]) -> dict[str, float]:
    """How different the samples of one prompt are: the mean distance of their pairs.

    The distance of two clips is the root mean square difference of their pixels, black 0 and
    white 1. A policy that gives every noise the same clip has 0, however good that clip is.
    """
    distances = []
    for group in _groups(ids):
        clips = videos[group].astype(np.float32).reshape(len(group), -1) / 255
        for row in range(len(clips) - 1):
            # A clip is compared with all later ones of its prompt, so that every pair counts once.
            distances += list(np.sqrt(((clips[row + 1 :] - clips[row]) ** 2).mean(axis=1)))
    return {"diversity": float(np.mean(distances))} if distances else {}


def _world_metrics(
    config: schema.Config, videos: np.ndarray, captions: list[str]
) -> dict[str, float]:
    """What only the moving-shapes world knows of its clips."""
    found = {}
    if config.eval.manifold_distance:
        from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes

        found["manifold_distance"] = float(np.mean(moving_shapes.manifold_distance(videos)))
    if config.eval.shape_identity:
        from sage_grpo_jax.worlds.moving_shapes import recognition as shape_recognition

        identity = shape_recognition.identity(videos, captions)
        found |= {f"shape/{name}": value for name, value in identity._asdict().items()}
    return found


def save_samples(
    result: Evaluation, workdir: pathlib.Path, name: str, config: schema.Config
) -> bytes:
    """Writes `samples/NAME.png`, `.gif` and `.json`; returns the GIF.

    The pictures show one clip of each of the first `eval.sheet_prompts` prompts, which were drawn
    by `eval.seed` before anything was sampled. The JSON has the rewards of every sample, and
    which of them are optimised: their sum is the overall reward.
    """
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)

    # The pictures. Small clips are blown up so that a viewer sees more than a stamp.
    rows = [group[0] for group in _groups(result.prompts)][: config.eval.sheet_prompts]
    videos = result.videos[rows]
    scale = max(1, 96 // config.video.height)
    optimised = [reward for reward in result.scores if reward in config.rewards.optimised]
    total = sum(result.scores[reward] for reward in optimised)
    captions = [f"{result.prompts[row]}   {total[row]:+.2f}" for row in rows]
    sheet = media.contact_sheet(videos, captions, scale=scale)
    media.write_picture(folder / f"{name}.png", sheet)
    gif = media.encode_gif(media.tile(videos, columns=4), config.video.fps, scale)
    files.write_atomically(folder / f"{name}.gif", gif)

    # The numbers; JSON has no NaN, a failed sample is null
    scores = {
        reward: [float(v) if np.isfinite(v) else None for v in values]
        for reward, values in result.scores.items()
    }
    table = json.dumps({"prompts": result.prompts, "rewards": scores, "optimised": optimised})
    files.write_atomically(folder / f"{name}.json", table.encode())
    return gif
