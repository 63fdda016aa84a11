"""What a run (or several seeds of it) achieved: tables, a reward curve, before/after pictures."""

import dataclasses
import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageSequence

from sage_grpo_jax.common import files, progress
from sage_grpo_jax.data import media
from sage_grpo_jax.training import metrics
from sage_grpo_jax.training import workdir as workdir_lib

OVERALL = "eval/reward/overall"
DISTANCE = "eval/manifold_distance"
ROWS = (
    ("reward overall", OVERALL),
    ("reward weighted", "eval/reward/weighted"),
    ("reward VQ", "eval/reward/vq"),
    ("reward MQ", "eval/reward/mq"),
    ("reward TA", "eval/reward/ta"),
    ("manifold distance", DISTANCE),
)
WINDOW = 9  # steps that the curves average over
PHASES = ("rollout", "decode", "reward", "update", "eval")
UNKNOWN = "–"  # in tables: not measured, or without a single valid reward


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run, read from its workdir."""

    workdir: pathlib.Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it was measured."""
        rows = [row for row in self.rows if _is_number(row.get(name))]
        return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows])

    def evaluation(self, when: str) -> dict[str, float]:
        """What the `first` or the `last` evaluation measured; empty where there was none."""
        values = self.summary["eval"].get(when) or {}
        return {name: value for name, value in values.items() if value is not None}

    def before_after(self, name: str) -> tuple[float, float] | None:
        """A metric of the first and of the last evaluation; None unless both have it."""
        first, last = self.evaluation("first").get(name), self.evaluation("last").get(name)
        return None if first is None or last is None else (first, last)

    def gain(self) -> float | None:
        """Rise of the overall reward on the evaluation prompts."""
        pair = self.before_after(OVERALL)
        return None if pair is None else pair[1] - pair[0]

    def distance_ratio(self) -> float | None:
        """Relative change of the distance to the manifold."""
        pair = self.before_after(DISTANCE)
        return None if pair is None or pair[0] == 0 else pair[1] / pair[0] - 1

    def gain_error(self) -> float:
        """Standard error of the gain over the prompts, as if both evaluations were independent."""
        name = f"{OVERALL}_standard_error"
        return math.hypot(*(self.evaluation(when).get(name, 0.0) for when in ("first", "last")))


def read_run(workdir: pathlib.Path) -> RunRecord:
    """Reads summary.json and metrics.jsonl.

    Raises:
      ValueError: the run has not finished, or a file of it is damaged; naming the file.
    """
    path = workdir / "summary.json"
    if not path.exists():
        raise ValueError(f"--runs: {workdir} has no summary.json; allowed: finished runs")
    summary = workdir_lib.read_object(path, "--runs")
    _check_summary(summary, path)
    try:
        rows = metrics.read_metrics(workdir / metrics.METRICS_FILE)
    except ValueError as error:
        raise ValueError(f"--runs: {error}; allowed: the metrics of a run") from error
    return RunRecord(workdir, summary, rows)


def _check_summary(summary: dict[str, Any], path: pathlib.Path) -> None:
    kinds = {"method": str, "seed": int, "steps": int, "eval": dict, "time": dict}
    for name, kind in kinds.items():
        if not isinstance(summary.get(name), kind):
            found = f"is {summary[name]!r}" if name in summary else "is missing"
            raise ValueError(f"--runs: {path}: {name} {found}; allowed: the summary of a run")
    groups = {"time": summary["time"]}
    groups |= {f"eval.{when}": summary["eval"].get(when) or {} for when in ("first", "last")}
    for name, values in groups.items():
        numbers = isinstance(values, dict) and all(
            value is None or _is_number(value) for value in values.values()
        )
        if not numbers:
            raise ValueError(f"--runs: {path}: {name} is {values!r}; allowed: numbers by name")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def mean_with_error(values: Sequence[float]) -> str:
    """Mean and standard error; of a single value the value alone, of none that it is not known."""
    if not values:
        return UNKNOWN
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    return f"{np.mean(values):+.3f} ± {standard_error(values):.3f}"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def table(run: RunRecord) -> str:
    """Before, after, change and its standard errors; then seconds by phase. Plain text."""
    lines = [f"{'held-out prompts':<20}{'before':>10}{'after':>10}{'change':>10}"]
    for label, name in ROWS:
        if (pair := run.before_after(name)) is not None:
            first, last = pair
            lines.append(f"{label:<20}{first:>10.4f}{last:>10.4f}{last - first:>+10.4f}")
    if len(lines) == 1:
        lines = ["no evaluation before and after has a value"]
    gain, error = run.gain(), run.gain_error()
    if gain is not None and error:
        lines.append(f"overall reward: {gain / error:+.1f} standard errors over the prompts")
    seconds = run.summary["time"]
    phases = [f"{p} {progress.format_seconds(seconds.get(f'time/{p}') or 0.0)}" for p in PHASES]
    lines.append(f"time by phase: {', '.join(phases)} ({run.summary['steps']} steps)")
    return "\n".join(lines)


def seeds_table(runs: Sequence[RunRecord]) -> str:
    """Markdown: every run, then mean and standard error over runs."""
    lines = [
        "| seed | reward before | after | change | change / s.e. "
        "| manifold before | after | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_seed_cells(run))} |" for run in runs]
    gains = [gain for run in runs if (gain := run.gain()) is not None]
    ratios = [ratio for run in runs if (ratio := run.distance_ratio()) is not None]
    if len(runs) > 1:
        error = standard_error(gains) if len(gains) > 1 else 0.0
        in_errors = f"{np.mean(gains) / error:+.1f} (over seeds)" if error else UNKNOWN
        distance = f"{100 * np.mean(ratios):+.1f} %" if ratios else UNKNOWN
        lines.append(f"| mean | | | {mean_with_error(gains)} | {in_errors} | | | {distance} |")
    return "\n".join(lines)


def _seed_cells(run: RunRecord) -> list[str]:
    """The cells of one run in `seeds_table`."""
    cells = [str(run.summary["seed"])]
    gain, error = run.gain(), run.gain_error()
    cells += [f"{value:.3f}" for value in run.before_after(OVERALL) or ()] or [UNKNOWN] * 2
    cells.append(UNKNOWN if gain is None else f"{gain:+.3f}")
    cells.append(f"{gain / error:+.1f}" if gain is not None and error else UNKNOWN)
    cells += [f"{value:.4f}" for value in run.before_after(DISTANCE) or ()] or [UNKNOWN] * 2
    ratio = run.distance_ratio()
    cells.append(UNKNOWN if ratio is None else f"{100 * ratio:+.1f} %")
    return cells


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
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure of matplotlib as PNG, whole or not at all, and closes it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    files.write_atomically(path, buffer.getvalue())


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


def write_before_after(run: RunRecord, out: pathlib.Path) -> bool:
    """`before_after.png` and `.gif`: the same prompts and noise, first and last evaluation.

    Returns:
      Whether the run has samples; without any, nothing is written.
    """
    found = sorted((run.workdir / "samples").glob("step_*.png"))
    if not found:
        return False
    first, last = found[0], found[-1]
    titles = ("before", f"after {run.summary['steps']} steps")
    pictures = [Image.open(p).convert("RGB") for p in (first, last)]
    media.write_picture(out / "before_after.png", _side_by_side(pictures, titles))
    clips = [
        [f.convert("RGB") for f in ImageSequence.Iterator(Image.open(p.with_suffix(".gif")))]
        for p in (first, last)
    ]
    # As many as both have: a GIF keeps no frame that is equal to the one before it.
    frames = [_side_by_side(pair, titles) for pair in zip(*clips, strict=False)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=Image.open(first.with_suffix(".gif")).info["duration"],
        loop=0,
    )
    files.write_atomically(out / "before_after.gif", buffer.getvalue())
    return True


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
