"""The evaluation: fixed prompts, fixed seeds, the ODE sampler; numbers, sheets and animations."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from sage_grpo_jax.common import files
from sage_grpo_jax.data import media
from sage_grpo_jax.flow import noise
from sage_grpo_jax.training import conditions
from sage_grpo_jax.training import learner as learner_lib


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float]  # names start with eval/
    videos: np.ndarray  # uint8 [N, F, H, W, 3]
    prompts: list[str]
    scores: dict[str, np.ndarray]  # dimension -> [N]; NaN where the reward failed


def evaluate(learner: learner_lib.Learner, params: Any, prompts: conditions.PromptBatch):
    """Samples, scores and measures the evaluation prompts.

    The noise depends on `eval.seed`, prompt and sample only, so every evaluation of a run (and of
    another run) starts from the same noise.

    Args:
      learner: gives programs and scorer.
      params: the policy's parameters.
      prompts: N prompts, `eval.samples_per_prompt` of each already repeated.
    """
    config = learner.config
    size = config.batch_size
    count = len(prompts.ids)
    occurrence = _occurrence(prompts.ids)
    keys = noise.sample_keys(
        config.eval.seed,
        0,
        np.zeros(count, np.uint32),
        np.array([noise.prompt_hash(i) for i in prompts.ids], np.uint32),
        occurrence,
    )
    videos, parts = [], []
    for start in range(0, count, size):
        # The last batch is filled up with its own samples: one shape, one compilation.
        rows = np.arange(start, start + size) % count
        batch = prompts.take(rows)
        videos.append(learner.decode(learner.sample(params, batch, keys[rows])))
        parts.append(learner.score_videos(videos[-1], batch, f"eval{start}"))
    videos = np.concatenate(videos)[:count]
    scores = learner_lib.Scores(
        {n: np.concatenate([p.values[n] for p in parts])[:count] for n in parts[0].values},
        np.concatenate([p.valid for p in parts])[:count],
    )
    return Evaluation(_metrics(config, scores, videos), videos, prompts.prompts, scores.values)


def _occurrence(ids: list[str]) -> np.ndarray:
    """How often each id came before: the sample number; uint32 [N]."""
    seen: dict[str, int] = {}
    numbers = []
    for name in ids:
        numbers.append(seen.get(name, 0))
        seen[name] = numbers[-1] + 1
    return np.array(numbers, np.uint32)


def _metrics(config, scores: learner_lib.Scores, videos: np.ndarray) -> dict[str, float]:
    weights = dataclasses.asdict(config.rewards.weights)
    values = learner_lib.reward_metrics(scores, weights)
    overall = scores.weighted(dict.fromkeys(weights, 1.0))[scores.valid]
    if len(overall) > 1:
        values["reward/overall_standard_error"] = float(overall.std(ddof=1) / len(overall) ** 0.5)
    if config.eval.manifold_distance:
        # Only the moving-shapes world knows its manifold.
        from sage_grpo_jax.data import moving_shapes

        distance = np.asarray(moving_shapes.manifold_distance(videos))
        values["manifold_distance"] = float(distance.mean())
    return {f"eval/{name}": value for name, value in values.items()}


def save_samples(result: Evaluation, workdir: pathlib.Path, name: str, config) -> bytes:
    """Writes `samples/NAME.png` and `.gif`; returns the GIF."""
    count = min(config.eval.sheet_prompts, len(result.videos))
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    videos = result.videos[:count]
    scale = max(1, 96 // config.video.height)
    total = sum(result.scores.values())
    captions = [f"{p}   {s:+.2f}" for p, s in zip(result.prompts, total, strict=True)]
    sheet = media.contact_sheet(videos, captions[:count], scale=scale)
    media.write_picture(folder / f"{name}.png", sheet)
    gif = media.encode_gif(media.tile(videos, columns=4), config.video.fps, scale)
    files.write_atomically(folder / f"{name}.gif", gif)
    return gif
