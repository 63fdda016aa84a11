"""What a sweep found: a CSV with one row a run, a heat map, curves with bands over seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from sage_grpo_jax.common import files
from sage_grpo_jax.experiments import run_report, sweeps
from sage_grpo_jax.training import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A finished run and the overrides that tell it from the others."""

    record: run_report.RunRecord
    overrides: dict[str, Any]

    @property
    def gain(self) -> float | None:
        """Rise of the overall reward on the evaluation prompts; None where it is not known."""
        return self.record.gain()


def read_sweep(workdir: pathlib.Path) -> tuple[list[SweepRun], int]:
    """(finished runs, number of points).

    Raises:
      ValueError: no sweep there, a damaged file, or no run of it has finished.
    """
    path = workdir / sweeps.SWEEP_FILE
    if not path.exists():
        raise ValueError(f"--runs: {workdir} has no {sweeps.SWEEP_FILE}; allowed: a sweep's folder")
    points = workdir_lib.read_object(path, "--runs").get("points")
    # The file may have been changed by hand.
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise ValueError(f"--runs: {path} does not list the points of a sweep; allowed: run sweep")
    runs = [
        SweepRun(run_report.read_run(workdir / p["folder"]), p["overrides"])
        for p in points
        if (workdir / p["folder"] / "summary.json").exists()
    ]
    if not runs:
        raise ValueError(f"--runs: no run of the sweep {workdir} has finished")
    return runs, len(points)


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("folder"), str)
        and isinstance(value.get("overrides"), dict)
        and not any(isinstance(v, list | dict) for v in value["overrides"].values())
    )


def to_csv(runs: Sequence[SweepRun]) -> str:
    """One row a run: overrides, then first, last and change of every evaluation metric, seconds."""
    # Columns: whatever any run has; a run without a value leaves its cell empty.
    names = list(dict.fromkeys(name for run in runs for name in run.overrides))
    measured = sorted({name for run in runs for name in run.record.evaluation("last", "eval")})

    out = io.StringIO()
    writer = csv.writer(out)
    columns = [f"eval/{name} {when}" for name in measured for when in ("first", "last", "change")]
    writer.writerow([*names, "steps", *columns, "seconds"])

    # A row for each run.
    for run in runs:
        before, after = (
            run.record.evaluation("first", "eval"),
            run.record.evaluation("last", "eval"),
        )
        values: list[float | None] = []
        for name in measured:
            first, last = before.get(name), after.get(name)
            known = first is not None and last is not None
            values += [first, last, last - first if known else None]
        settings = [run.overrides.get(name) for name in names]
        seconds = run.record.summary["time"].get("time/step")
        writer.writerow([*settings, run.record.summary["steps"], *values, seconds])
    return out.getvalue()


def varying(runs: Sequence[SweepRun]) -> list[str]:
    """Names of the overrides with more than one value, the seed apart."""
    # As JSON: in a set of plain values 1, 1.0 and true would be one.
    names = dict.fromkeys(name for run in runs for name in run.overrides if name != sweeps.SEED)
    return [n for n in names if len({json.dumps(r.overrides.get(n)) for r in runs}) > 1]


def by_setting(runs: Sequence[SweepRun]) -> dict[tuple[Any, ...], list[SweepRun]]:
    """Runs that differ in the seed only, by the values of `varying`."""
    groups: dict[tuple[Any, ...], list[SweepRun]] = {}
    for run in runs:
        key = tuple(run.overrides.get(name) for name in varying(runs))
        groups.setdefault(key, []).append(run)
    return groups


def table(runs: Sequence[SweepRun], points: int) -> str:
    """Markdown: every setting with its gain over the seeds, the best first."""
    names = varying(runs)
    # Settings without a known gain come last.
    rows = []
    for key, members in by_setting(runs).items():
        gains = _gains(members)
        ratios = [r for run in members if (r := run.record.distance_ratio()) is not None]
        distance = f"{100 * np.mean(ratios):+.1f} %" if ratios else run_report.UNKNOWN
        seeds = len(members) if len(gains) == len(members) else f"{len(gains)} of {len(members)}"
        cells = [*map(str, key), run_report.mean_with_error(gains), distance, seeds]
        rows.append((-np.mean(gains) if gains else math.inf, cells))

    rows.sort(key=lambda row: row[0])
    lines = [
        f"{len(runs)} of {points} runs finished.",
        "",
        "| " + " | ".join([*names, "reward gain", "manifold distance", "seeds"]) + " |",
        "|---" * (len(names) + 3) + "|",
        *("| " + " | ".join(map(str, cells)) + " |" for _, cells in rows),
    ]
    return "\n".join(lines)


def _gains(members: Sequence[SweepRun]) -> list[float]:
    """Those that are known."""
    return [run.gain for run in members if run.gain is not None]


def write(runs: Sequence[SweepRun], points: int, out: pathlib.Path) -> str:
    """Writes runs.csv, sweep.md, heat_map.png and curves.png of `read_sweep`; returns the table."""
    text = table(runs, points)
    files.write_atomically(out / "runs.csv", to_csv(runs).encode())
    files.write_atomically(out / "sweep.md", (text + "\n").encode())
    _write_heat_map(runs, out / "heat_map.png")
    _write_curves(runs, out / "curves.png")
    return text


def _label(names: Sequence[str], values: Sequence[Any]) -> str:
    pairs = zip(names, values, strict=True)
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in pairs)


def _pyplot() -> types.ModuleType:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _write_heat_map(runs: Sequence[SweepRun], path: pathlib.Path) -> None:
    """Gain, first varying override down, the others across; mean over seeds."""
    # The table of means; what has not finished stays NaN and is left white.
    names, groups = varying(runs), by_setting(runs)
    down = sorted({key[:1] for key in groups}, key=str)
    across = sorted({key[1:] for key in groups}, key=str)
    gains = np.full((len(down), len(across)), np.nan)
    for key, members in groups.items():
        if known := _gains(members):
            gains[down.index(key[:1]), across.index(key[1:])] = np.mean(known)

    # Colours: as far to both sides, so that white is no change.
    pyplot = _pyplot()
    size = (2.5 + 1.3 * len(across), 2 + 0.6 * len(down))
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    limit = np.abs(gains[np.isfinite(gains)]).max(initial=0.0) or 1.0
    image = axis.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")

    # The numbers, readable on dark cells too.
    for (i, j), gain in np.ndenumerate(gains):
        if np.isfinite(gain):
            color = "white" if abs(gain) > 0.6 * limit else "black"
            axis.text(j, i, f"{gain:+.2f}", ha="center", va="center", color=color)

    labels = [_label(names[1:], key).replace(", ", "\n") for key in across]
    axis.set_xticks(range(len(across)), labels, fontsize=7)
    axis.set_yticks(range(len(down)), [_label(names[:1], key) for key in down], fontsize=8)
    axis.set_title("gain of the overall reward, held-out prompts")
    figure.colorbar(image, ax=axis)
    run_report.save_figure(figure, path)


def _write_curves(runs: Sequence[SweepRun], path: pathlib.Path) -> None:
    """The training reward of every setting: mean over seeds, smoothed; the band is one error."""
    pyplot = _pyplot()
    names = varying(runs)
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for i, (key, members) in enumerate(by_setting(runs).items()):
        # As far as all seeds of the setting have come.
        series = [run.record.series("reward/overall") for run in members]
        length = min(len(steps) for steps, _ in series)
        if length == 0:
            continue

        # matplotlib has ten colours to go round.
        smooth = run_report.moving_average(np.stack([values[:length] for _, values in series]))
        steps = run_report.moving_average(series[0][0][:length])
        color = f"C{i % 10}"
        axis.plot(steps, smooth.mean(axis=0), color=color, label=_label(names, key) or "all")

        # One standard error over the seeds, to both sides.
        if len(members) > 1:
            error = smooth.std(axis=0, ddof=1) / math.sqrt(len(members))
            mean = smooth.mean(axis=0)
            axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2)

    axis.set(
        title=f"overall reward, training prompts (mean of {run_report.WINDOW} steps)",
        xlabel="step",
    )
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    run_report.save_figure(figure, path)
