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
from sage_grpo_jax.rewards import names
from sage_grpo_jax.training import metrics
from sage_grpo_jax.training import workdir as workdir_lib

OVERALL = "reward/overall"
DISTANCE = "manifold_distance"
SHAPE = "shape/clips"
# The rows of a table after those of the rewards.
ROWS = (
    ("manifold distance", DISTANCE),
    ("shape right: clips", SHAPE),
    ("shape right: frames", "shape/frames"),
    ("... first frames", "shape/first_frame"),
    ("diversity", "diversity"),
)
# Split -> what it is called in tables.
SPLITS = {"eval": "validation prompts", "test": "test prompts"}
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

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that were measured while it trained, in lower case."""
        return names.measured(dict.fromkeys(name for row in self.rows for name in row))

    @property
    def reported(self) -> str:
        """The split that results are reported on: the test prompts, where the run has some."""
        return "test" if self.evaluation("last", "test") else "eval"

    def evaluation(self, when: str, split: str) -> dict[str, float]:
        """What the `first` or the `last` evaluation of a split measured; empty without one."""
        values = self.summary.get(split, {}).get(when) or {}
        return {
            name.removeprefix(f"{split}/"): value
            for name, value in values.items()
            if value is not None
        }

    def before_after(self, name: str, split: str = "eval") -> tuple[float, float] | None:
        """A metric of the first and of the last evaluation; None unless both have it."""
        pair = [self.evaluation(when, split).get(name) for when in ("first", "last")]
        return None if None in pair else tuple(pair)

    def gain(self, split: str = "eval") -> float | None:
        """Rise of the overall reward on a split; choices are made on the default one."""
        pair = self.before_after(OVERALL, split)
        return None if pair is None else pair[1] - pair[0]

    def distance_ratio(self, split: str = "eval") -> float | None:
        """Relative change of the distance to the manifold."""
        pair = self.before_after(DISTANCE, split)
        return None if pair is None or pair[0] == 0 else pair[1] / pair[0] - 1

    def gain_error(self, split: str = "eval") -> float:
        """Standard error of the gain over the prompts.

        Of the changes prompt by prompt, where the samples' rewards are there (the noise is that of
        the first evaluation); else as if both evaluations were independent.
        """
        # Prompt by prompt the same noise is on both sides, and most of it cancels.
        changes = self._changes(split)
        if len(changes) > 1:
            return standard_error(changes)

        # Without the samples: as if independent, which usually overstates the error.
        name = f"{OVERALL}_standard_error"
        errors = [self.evaluation(when, split).get(name, 0.0) for when in ("first", "last")]
        return math.hypot(*errors)

    def _changes(self, split: str) -> list[float]:
        """The change of the overall reward of every prompt; empty where it is not known."""
        found = self.samples(split, ".json")
        if found is None:
            return []
        first, last = (_rewards_by_prompt(path) for path in found)
        return [last[prompt] - first[prompt] for prompt in first if prompt in last]

    def samples(self, split: str, suffix: str) -> tuple[pathlib.Path, pathlib.Path] | None:
        """The files of the first and the last evaluation of a split; None unless both are there."""
        # Named by step, with leading zeros: sorted by name they are in order.
        pattern = {"eval": "step_*", "test": "test_step_*"}[split] + suffix
        found = sorted((self.workdir / "samples").glob(pattern))
        return (found[0], found[-1]) if found else None


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


def _rewards_by_prompt(path: pathlib.Path) -> dict[str, float]:
    """The mean overall reward of every prompt that has one, from a `samples/*.json`.

    Files of before rewards could be monitored only do not say which ones are optimised: all.

    Raises:
      ValueError: the file is damaged.
    """
    # The sum over the rewards that are optimised, then the mean over the samples of a prompt.
    table = workdir_lib.read_object(path, "--runs")
    try:
        summed = table.get("optimised", list(table["rewards"]))
        columns = [table["rewards"][name] for name in summed]
        rewards = np.array(columns, np.float64).sum(axis=0)
        found: dict[str, list[float]] = {}
        for prompt, reward in zip(table["prompts"], rewards, strict=True):
            found.setdefault(prompt, []).append(reward)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--runs: {path}: {error!r}; allowed: the samples of an evaluation"
        ) from error
    # A sample that failed has null there, which NumPy reads as NaN; its prompt has no mean then.
    means = {prompt: float(np.mean(values)) for prompt, values in found.items()}
    return {prompt: mean for prompt, mean in means.items() if math.isfinite(mean)}


def _check_summary(summary: dict[str, Any], path: pathlib.Path) -> None:
    # What every report asks for.
    kinds = {"method": str, "seed": int, "steps": int, "eval": dict, "time": dict}
    for name, kind in kinds.items():
        if not isinstance(summary.get(name), kind):
            found = f"is {summary[name]!r}" if name in summary else "is missing"
            raise ValueError(f"--runs: {path}: {name} {found}; allowed: the summary of a run")

    # Groups of numbers, some of which may not be known (null).
    groups = {"time": summary["time"]}
    # Runs of before have no test prompts.
    for split in (split for split in SPLITS if isinstance(summary.get(split), dict)):
        groups |= {f"{split}.{w}": summary[split].get(w) or {} for w in ("first", "last")}
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
    lines = [line for split in SPLITS for line in _split_lines(run, split)]
    lines = lines or ["no evaluation before and after has a value"]
    seconds = run.summary["time"]
    phases = [f"{p} {progress.format_seconds(seconds.get(f'time/{p}') or 0.0)}" for p in PHASES]
    lines.append(f"time by phase: {', '.join(phases)} ({run.summary['steps']} steps)")
    return "\n".join(lines)


def _split_lines(run: RunRecord, split: str) -> list[str]:
    """The lines of one split in `table`; none where nothing was measured."""
    lines = [f"{SPLITS[split]:<20}{'before':>10}{'after':>10}{'change':>10}"]
    for label, name in (*_reward_rows(run, split), *ROWS):
        if (pair := run.before_after(name, split)) is not None:
            first, last = pair
            lines.append(f"{label:<20}{first:>10.4f}{last:>10.4f}{last - first:>+10.4f}")
    gain, error = run.gain(split), run.gain_error(split)
    if gain is not None and error:
        lines.append(f"overall reward: {gain / error:+.1f} standard errors over the prompts")
    return lines if len(lines) > 1 else []


def _reward_rows(run: RunRecord, split: str) -> list[tuple[str, str]]:
    """(label, metric) of the sums, then of every reward that the run measured."""
    rewards = ("overall", "weighted", *names.measured(run.evaluation("last", split)))
    return [(f"reward {name}", names.metric(name)) for name in rewards]


def seeds_table(runs: Sequence[RunRecord]) -> str:
    """Markdown: every run on the split it reports, then mean and standard error over runs."""
    lines = [
        "| seed | reward before | after | change | change / s.e. "
        "| manifold before | after | change | shape right before | after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_seed_cells(run))} |" for run in runs]

    # The last row, over the seeds that have the value.
    gains = [gain for run in runs if (gain := run.gain(run.reported)) is not None]
    ratios = [r for run in runs if (r := run.distance_ratio(run.reported)) is not None]
    if len(runs) > 1:
        error = standard_error(gains) if len(gains) > 1 else 0.0
        in_errors = f"{np.mean(gains) / error:+.1f} (over seeds)" if error else UNKNOWN
        distance = f"{100 * np.mean(ratios):+.1f} %" if ratios else UNKNOWN
        pairs = [pair for run in runs if (pair := run.before_after(SHAPE, run.reported))]
        shape = [mean_with_error([pair[i] for pair in pairs]) for i in (0, 1)]
        lines.append(
            f"| mean | | | {mean_with_error(gains)} | {in_errors} | | | {distance} "
            f"| {' | '.join(shape)} |"
        )
    return "\n".join(lines)


def _seed_cells(run: RunRecord) -> list[str]:
    """The cells of one run in `seeds_table`."""
    cells = [str(run.summary["seed"])]
    split = run.reported
    gain, error = run.gain(split), run.gain_error(split)
    cells += [f"{value:.3f}" for value in run.before_after(OVERALL, split) or ()] or [UNKNOWN] * 2
    cells.append(UNKNOWN if gain is None else f"{gain:+.3f}")
    cells.append(f"{gain / error:+.1f}" if gain is not None and error else UNKNOWN)
    cells += [f"{value:.4f}" for value in run.before_after(DISTANCE, split) or ()] or [UNKNOWN] * 2
    ratio = run.distance_ratio(split)
    cells.append(UNKNOWN if ratio is None else f"{100 * ratio:+.1f} %")
    cells += [f"{v:.3f}" for v in run.before_after(SHAPE, split) or ()] or [UNKNOWN] * 2
    return cells


def write_curve(runs: Sequence[RunRecord], path: pathlib.Path) -> None:
    """The training reward of every step and the evaluations, as PNG."""
    import matplotlib

    # Draws into memory: machines that train have no screen.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors: dict[str, str] = {}  # of the rewards, the same in all runs
    for i, run in enumerate(runs):
        # Left: the sum, on training prompts and in the evaluations between.
        label = f"{run.summary['method']}, seed {run.summary['seed']}"
        _plot_smoothed(axes[0], run, "reward/overall", f"C{i}", label)
        steps, values = run.series(f"{run.reported}/{OVERALL}")
        text = f"{label}: {SPLITS[run.reported]}"
        axes[0].plot(steps, values, color=f"C{i}", label=text, marker="o", linestyle="--")

        # Right: each reward; in the legend it stands once, whatever the number of runs.
        for name in run.rewards:
            text = name if name not in colors else None
            color = colors.setdefault(name, f"C{len(colors)}")
            _plot_smoothed(axes[1], run, names.metric(name), color, text)

    smoothing = f"mean of {WINDOW} steps"
    axes[0].set(title=f"overall reward ({smoothing})", xlabel="step", ylabel="reward/overall")
    axes[1].set(title=f"each reward, training prompts ({smoothing})", xlabel="step")

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


def _plot_smoothed(axis: Any, run: RunRecord, name: str, color: str, label: str | None) -> None:
    """Every step faintly, and the moving average: a step sees a handful of prompts only."""
    steps, values = run.series(name)
    axis.plot(steps, values, color=color, alpha=0.15)
    if len(values):
        axis.plot(moving_average(steps), moving_average(values), color=color, label=label)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Means of up to `WINDOW` neighbours along the last axis; of fewer in a short series."""
    # A short series keeps at least three quarters of its points.
    window = max(1, min(WINDOW, values.shape[-1] // 4))
    return np.lib.stride_tricks.sliding_window_view(values, window, axis=-1).mean(axis=-1)


def write_before_after(run: RunRecord, out: pathlib.Path) -> bool:
    """`before_after.png` and `.gif`: the same prompts and noise, before and after the run.

    The prompts are the first ones of the split that is reported, in the order that `eval.seed`
    draws them: nobody has chosen them.

    Returns:
      Whether the run has samples; without any, nothing is written.
    """
    # The first and the last evaluation.
    found = run.samples(run.reported, ".png")
    if found is None:
        return False

    # As pictures.
    first, last = found
    titles = ("before", f"after {run.summary['steps']} steps")
    pictures = [Image.open(p).convert("RGB") for p in (first, last)]
    media.write_picture(out / "before_after.png", _side_by_side(pictures, titles))

    # As clips.
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
    # Pixels: between the pictures, and above them for the titles.
    gap, head = 16, 18
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures) + head), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for picture, title in zip(pictures, titles, strict=True):
        draw.text((left + 4, 3), title, fill="black")
        canvas.paste(picture, (left, head))
        left += picture.width + gap
    return canvas
