"""Runs every point of a config file's `sweep(add)`, or one of them, or only tells what it would do.

    python -m sage_grpo_jax.sweep --config=configs/sweeps/eta_kl.py --workdir=runs/eta_kl --plan
    python -m sage_grpo_jax.sweep --config=configs/sweeps/eta_kl.py --workdir=runs/eta_kl
    python -m sage_grpo_jax.report --runs=runs/eta_kl --out=runs/eta_kl/report

--list prints the points, --index=I runs one (for job arrays). Runs are processes of their own; a
rerun skips what is finished and goes on with what is not. Overrides hold for all points.
"""

import functools
import pathlib
import signal
import subprocess
import sys

import jax
from absl import flags
from ml_collections import config_flags

from sage_grpo_jax.common import command_line, progress
from sage_grpo_jax.experiments import sweeps
from sage_grpo_jax.training import workdir as workdir_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="Recipe with a function sweep(add).", lock_config=True
)
flags.mark_flag_as_required(_CONFIG)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)
_LIST = flags.DEFINE_bool("list", False, "Print the points and stop.")
_PLAN = flags.DEFINE_bool("plan", False, "Print what is left to do and what it costs, and stop.")
_INDEX = flags.DEFINE_integer("index", None, "Run this point only.")


def run(point: sweeps.Point, shared: list[str]) -> tuple[int, bool]:
    """Trains one point in a process of its own, which is told of signals.

    Returns:
      Its exit status; whether a signal asked the sweep to stop.
    """
    command = [sys.executable, "-m", "sage_grpo_jax.train", *shared]
    command += [*sweeps.flags_of(point.overrides), f"--workdir={point.folder}"]

    asked: list[int] = []
    # Before the process is there: a signal that comes in between is passed on as soon as it is.
    previous = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        process = subprocess.Popen(command)
        while (status := _wait(process)) is None:
            if asked:
                # Always this one: twice SIGINT, which a terminal sends to both, means at once.
                process.send_signal(signal.SIGTERM)
                status = process.wait()
                break
        return status, bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen) -> int | None:
    """The exit status, or None after a moment."""
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None


def listing(points: list[sweeps.Point]) -> str:
    """One line a point: index, status, overrides."""
    return "\n".join(
        f"{p.index:>4}  {p.status:<8}  " + "  ".join(f"{k}={v}" for k, v in p.overrides.items())
        for p in points
    )


def plan(points: list[sweeps.Point]) -> str:
    """What is left, in runs, steps and transformer passes; and in time, once a run has finished."""
    # What is left; a run that has begun counts as a whole one.
    left = [p for p in points if p.status != "finished"]
    steps = sum(p.config.num_steps for p in left)
    passes = sum(p.config.num_steps * sum(sweeps.forward_passes(p.config)) for p in left)
    lines = [
        f"{len(points)} points, {len(points) - len(left)} finished; left: {len(left)} runs, "
        f"{steps} steps, {passes:.3g} transformer passes (a backward pass counts as two)"
    ]

    # Time is estimated by transformer passes, in which points differ.
    seconds = _seconds_per_pass([p for p in points if p.status == "finished"])
    if seconds is not None:
        seconds *= passes
        lines.append(
            f"at the speed of the finished runs: {progress.format_seconds(seconds)}, one after "
            "another, without compilation and evaluation"
        )
    else:
        lines.append("no run that tells its time has finished yet: no estimate")
    return "\n".join(lines)


def _seconds_per_pass(done: list[sweeps.Point]) -> float | None:
    """Of the finished runs that say how long they took; None where none does."""
    seconds, passes = 0.0, 0
    for point in done:
        times = point.summary.get("time")
        spent = times.get("time/step") if isinstance(times, dict) else None
        if isinstance(spent, int | float):
            seconds += spent
            passes += point.summary["steps"] * sum(sweeps.forward_passes(point.config))
    return seconds / passes if passes else None


def main() -> None:
    """Lists, plans, or runs what is not finished; exit status 1 if a run failed."""
    # The runs are processes of their own, and an accelerator has room for one.
    jax.config.update("jax_platforms", "cpu")

    # All points are validated here, also those that are not run now.
    workdir, path = pathlib.Path(_WORKDIR.value), config_flags.get_config_filename(_config_flag())
    points = sweeps.read_points(path.partition(":")[0], _CONFIG.value, workdir)
    if _INDEX.value is not None and not 0 <= _INDEX.value < len(points):
        raise ValueError(f"--index: got {_INDEX.value}; allowed: 0 to {len(points) - 1}")
    if _LIST.value or _PLAN.value:
        print(listing(points) if _LIST.value else plan(points))
        return

    chosen = points if _INDEX.value is None else [points[_INDEX.value]]
    file = workdir / sweeps.SWEEP_FILE
    ours = functools.partial(workdir_lib.is_config, file)
    # sweep.json is written before the runs: `report` reads it while they go on.
    workdir_lib.make_folder(workdir, "--workdir", [file.name], "a sweep", ours)
    sweeps.write_index(path, points, workdir)
    failed = _run_all(chosen, [f"--config={path}", *sweeps.flags_of(_given_overrides())])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def _run_all(points: list[sweeps.Point], shared: list[str]) -> list[str]:
    """Runs what is not finished; returns the names of the runs that failed. Stops at a signal."""
    failed = []
    for number, point in enumerate(points, start=1):
        if point.status == "finished":
            continue
        print(f"[{number}/{len(points)}] {point.name}", flush=True)
        status, asked = run(point, shared)
        # A run that a signal stopped has saved its state: it did not fail.
        if status != 0 and not (asked and status in (-signal.SIGTERM, 128 + signal.SIGTERM)):
            failed.append(f"{point.name} (exit status {status})")
        if asked or (status == 0 and point.status != "finished"):
            print("stopped by a signal; the same command goes on")
            break
    return failed


def _config_flag() -> flags.Flag:
    return flags.FLAGS["config"]


def _given_overrides() -> dict[str, object]:
    return dict(config_flags.get_override_values(_config_flag()))


if __name__ == "__main__":
    command_line.run(main)
