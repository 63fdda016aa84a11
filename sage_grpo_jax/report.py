"""Tables and pictures of finished runs, or of a sweep.

    python -m sage_grpo_jax.report --runs=runs/a,runs/b --out=runs/report
    python -m sage_grpo_jax.report --runs=runs/eta_kl --out=runs/eta_kl/report

Prints the table of each run and, over several seeds, mean and standard error; writes report.md,
reward_curve.png, before_after.png and before_after.gif (of the first run). For the folder of a
sweep: runs.csv, sweep.md, heat_map.png and curves.png.
"""

import pathlib
import sys

from absl import app, flags

from sage_grpo_jax.common import files
from sage_grpo_jax.training import run_report, sweep_report, sweeps

_RUNS = flags.DEFINE_list("runs", None, "Workdirs of finished runs.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the report.", required=True)


def main(argv: list[str]) -> None:
    """Reads the runs and writes the report."""
    del argv
    out = pathlib.Path(_OUT.value)
    try:
        if (pathlib.Path(_RUNS.value[0]) / sweeps.SWEEP_FILE).exists():
            print(sweep_report.write(pathlib.Path(_RUNS.value[0]), out))
            print(f"\nwritten: {out}/runs.csv, sweep.md, heat_map.png, curves.png")
            return
        runs = [run_report.read_run(pathlib.Path(path)) for path in _RUNS.value]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    run_report.write_curve(runs, out / "reward_curve.png")
    run_report.write_before_after(runs[0], out)
    sections = [f"## {run.workdir.name}\n\n```\n{run_report.table(run)}\n```\n" for run in runs]
    for run in runs:
        print(f"\n{run.workdir}\n{run_report.table(run)}")
    if len(runs) > 1:
        over_seeds = run_report.seeds_table(runs)
        sections.append(f"## over seeds\n\n{over_seeds}\n")
        print(f"\n{over_seeds}")
    files.write_atomically(out / "report.md", "\n".join(sections).encode())
    print(f"\nwritten: {out}/report.md, reward_curve.png, before_after.png, before_after.gif")


if __name__ == "__main__":
    app.run(main)
