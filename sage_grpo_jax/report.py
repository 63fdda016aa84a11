"""Tables and pictures of finished runs, or of a sweep.

    python -m sage_grpo_jax.report --runs=runs/a,runs/b --out=runs/report
    python -m sage_grpo_jax.report --runs=runs/eta_kl --out=runs/eta_kl/report

Prints the table of each run and, over several seeds, mean and standard error; writes report.md,
reward_curve.png, before_after.png and before_after.gif (of the first run). For the folder of a
sweep: runs.csv, sweep.md, heat_map.png and curves.png.
"""

import pathlib

from absl import flags

from sage_grpo_jax.common import command_line, files, folders
from sage_grpo_jax.experiments import run_report, sweep_report, sweeps
from sage_grpo_jax.training import workdir as workdir_lib

_RUNS = flags.DEFINE_list("runs", None, "Workdirs of finished runs.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the report.", required=True)
_OF_RUNS = ("report.md", "reward_curve.png", "before_after.png", "before_after.gif")
_OF_SWEEP = ("runs.csv", "sweep.md", "heat_map.png", "curves.png")


def main() -> None:
    """Reads the runs, or the sweep, and writes the report."""
    out, paths = pathlib.Path(_OUT.value), [pathlib.Path(path) for path in _RUNS.value]
    # Runs or a sweep, told apart by the sweep's own file.
    found = [path for path in paths if (path / sweeps.SWEEP_FILE).exists()]
    if not found:
        _report_runs([run_report.read_run(path) for path in paths], out)
    elif len(paths) > 1:
        raise ValueError(f"--runs: {found[0]} is a sweep; allowed: runs, or one sweep alone")
    else:
        runs, points = sweep_report.read_sweep(paths[0])
        workdir_lib.make_folder(out, "--out", _OF_SWEEP, "a report")
        print(sweep_report.write(runs, points, out))
        folders.settle(out, _OF_SWEEP)
        print(f"\nwritten: {out}/runs.csv, sweep.md, heat_map.png, curves.png")


def _report_runs(runs: list[run_report.RunRecord], out: pathlib.Path) -> None:
    # The names are claimed first: somebody else's report.md is not overwritten.
    workdir_lib.make_folder(out, "--out", _OF_RUNS, "a report")
    run_report.write_curve(runs, out / "reward_curve.png")
    with_pictures = run_report.write_before_after(runs[0], out)

    # Text, on the screen and as a file.
    sections = [f"## {run.workdir.name}\n\n```\n{run_report.table(run)}\n```\n" for run in runs]
    for run in runs:
        print(f"\n{run.workdir}\n{run_report.table(run)}")
    if len(runs) > 1:
        over_seeds = run_report.seeds_table(runs)
        sections.append(f"## over seeds\n\n{over_seeds}\n")
        print(f"\n{over_seeds}")

    files.write_atomically(out / "report.md", "\n".join(sections).encode())
    folders.settle(out, _OF_RUNS)
    pictures = ", before_after.png, before_after.gif" if with_pictures else ""
    print(f"\nwritten: {out}/report.md, reward_curve.png{pictures}")
    if not with_pictures:
        print(f"no pictures: {runs[0].workdir} has no samples/step_*.png")


if __name__ == "__main__":
    command_line.run(main)
