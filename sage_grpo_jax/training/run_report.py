"""What a run (or several seeds of it) achieved: tables, a reward curve, before/after pictures."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageSequence

from sage_grpo_jax.common import progress
from sage_grpo_jax.training import metrics

ROWS = (
    ("reward overall", "eval/reward/overall"),
    ("reward weighted", "eval/reward/weighted"),
    ("reward VQ", "eval/reward/vq"),
    ("reward MQ", "eval/reward/mq"),
    ("reward TA", "eval/reward/ta"),
    ("manifold distance", "eval/manifold_distance"),
)
WINDOW = 9  # steps that the curves average over
PHASES = ("rollout", "decode", "reward", "update", "eval")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run, read from its workdir."""

    workdir: pathlib.Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it was measured."""
        rows = [row for row in self.rows if row.get(name) is not None]
        return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows])


def read_run(workdir: pathlib.Path) -> RunRecord:
    """Reads summary.json and metrics.jsonl.

    Raises:
      ValueError: the run has not finished.
    """
    path = workdir / "summary.json"
    if not path.exists():
        raise ValueError(f"--runs: {workdir} has no summary.json; allowed: finished runs")
    summary = json.loads(path.read_text())
    return RunRecord(workdir, summary, metrics.read_metrics(workdir / metrics.METRICS_FILE))


def table(run: RunRecord) -> str:
    """Before, after, change and its standard errors; then seconds by phase. Plain text."""
    first, last = run.summary["eval"]["first"], run.summary["eval"]["last"]
    error = _pooled_error(first, last)
    lines = [f"{'held-out prompts':<20}{'before':>10}{'after':>10}{'change':>10}"]
    for label, name in ROWS:
        if name in first and first[name] is not None and last[name] is not None:
            change = last[name] - first[name]
            lines.append(f"{label:<20}{first[name]:>10.4f}{last[name]:>10.4f}{change:>+10.4f}")
    if error:
        change = last["eval/reward/overall"] - first["eval/reward/overall"]
        lines.append(f"overall reward: {change / error:+.1f} standard errors over the prompts")
    seconds = run.summary["time"]
    phases = [f"{p} {progress.format_seconds(seconds.get(f'time/{p}', 0.0))}" for p in PHASES]
    lines.append(f"time by phase: {', '.join(phases)} ({run.summary['steps']} steps)")
    return "\n".join(lines)


def _pooled_error(first: dict[str, float], last: dict[str, float]) -> float:
    """Standard error of the difference of two evaluation means, as if independent."""
    name = "eval/reward/overall_standard_error"
    return math.hypot(first.get(name) or 0.0, last.get(name) or 0.0)


def seeds_table(runs: Sequence[RunRecord]) -> str:
    """Markdown: every run, then mean and standard error over runs."""
    lines = [
        "| seed | reward before | after | change | change / s.e. "
        "| manifold before | after | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    changes, ratios = [], []
    for run in runs:
        first, last = run.summary["eval"]["first"], run.summary["eval"]["last"]
        before, after = first["eval/reward/overall"], last["eval/reward/overall"]
        near, far = first["eval/manifold_distance"], last["eval/manifold_distance"]
        changes.append(after - before)
        ratios.append(far / near - 1)
        lines.append(
            f"| {run.summary['seed']} | {before:.3f} | {after:.3f} | {after - before:+.3f} "
            f"| {(after - before) / _pooled_error(first, last):+.1f} "
            f"| {near:.4f} | {far:.4f} | {100 * ratios[-1]:+.1f} % |"
        )
    if len(runs) > 1:
        error = np.std(changes, ddof=1) / math.sqrt(len(runs))
        lines.append(
            f"| mean | | | {np.mean(changes):+.3f} ± {error:.3f} "
            f"| {np.mean(changes) / error:+.1f} (over seeds) | | "
            f"| {100 * np.mean(ratios):+.1f} % |"
        )
    return "\n".join(lines)


def write_curve(runs: Sequence[RunRecord], path: pathlib.Path) -> None:
    """The training reward of every step and the evaluations, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, run in enumerate(runs):
        label = f"{run.summary['method']}, seed {run.summary['seed']}"
        _plot_smoothed(axes[0], run, "reward/overall", f"C{i}", label)
        held_out = f"{label}: held-out"
        steps, values = run.series("eval/reward/overall")
        axes[0].plot(steps, values, color=f"C{i}", label=held_out, marker="o", linestyle="--")
        for j, name in enumerate(("vq", "mq", "ta")):
            text = name.upper() if i == 0 else None
            _plot_smoothed(axes[1], run, f"reward/{name}", f"C{j}", text)
    smoothing = f"mean of {WINDOW} steps"
    axes[0].set(title=f"overall reward ({smoothing})", xlabel="step", ylabel="VQ + MQ + TA")
    axes[1].set(title=f"reward by dimension, training prompts ({smoothing})", xlabel="step")
    for axis in axes:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_smoothed(axis, run: RunRecord, name: str, color: str, label: str | None) -> None:
    """Every step faintly, and the moving average: a step sees a handful of prompts only."""
    steps, values = run.series(name)
    axis.plot(steps, values, color=color, alpha=0.15)
    if len(values):
        axis.plot(moving_average(steps), moving_average(values), color=color, label=label)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Means of up to `WINDOW` neighbours along the last axis; of fewer in a short series."""
    window = max(1, min(WINDOW, values.shape[-1] // 4))
    return np.lib.stride_tricks.sliding_window_view(values, window, axis=-1).mean(axis=-1)


def write_before_after(run: RunRecord, out: pathlib.Path) -> None:
    """`before_after.png` and `.gif`: the same prompts and noise, first and last evaluation."""
    folder = run.workdir / "samples"
    first, last = sorted(folder.glob("step_*.png"))[0], sorted(folder.glob("step_*.png"))[-1]
    titles = ("before", f"after {run.summary['steps']} steps")
    pictures = [Image.open(p).convert("RGB") for p in (first, last)]
    _side_by_side(pictures, titles).save(out / "before_after.png")
    clips = [
        [f.convert("RGB") for f in ImageSequence.Iterator(Image.open(p.with_suffix(".gif")))]
        for p in (first, last)
    ]
    frames = [_side_by_side(pair, titles) for pair in zip(*clips, strict=True)]
    frames[0].save(
        out / "before_after.gif",
        save_all=True,
        append_images=frames[1:],
        duration=Image.open(first.with_suffix(".gif")).info["duration"],
        loop=0,
    )


def _side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    gap, head = 16, 18
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures) + head), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for picture, title in zip(pictures, titles, strict=True):
        draw.text((left + 4, 3), title, fill="black")
        canvas.paste(picture, (left, head))
        left += picture.width + gap
    return canvas
