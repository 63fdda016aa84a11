"""What our terms cost within an update, and how XLA spends its time.

    JAX_PLATFORMS=cpu python benchmarks/step_parts.py --part=cost [--repeats=20 --references=0]
    JAX_PLATFORMS=cpu python benchmarks/step_parts.py --part=profile

`cost` compares updates of plain GRPO with those that have the equalizer and a trust region, by the
operations that XLA counts, CPU time and wall time: the difference of every repeat to the plain
update of the same repeat, and its standard error. `profile` counts the threads that have work in
rollout and update (Linux), and the operations that run while no other does.
"""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from step_vs_pytorch import NO_LIMITS, Ours, Times, make_config, open_mesh, parser

VARIANTS = {
    "plain GRPO": {"trust_region.kind": "none", "loss.equalizer": False},
    "with equalizer": {"trust_region.kind": "none"},
    "with equalizer, Eq. 15, controller": {
        "trust_region.kind": "stepwise",
        "trust_region.previous_estimator": "log_ratio",
    },
    "with equalizer, moving anchor": {"trust_region.kind": "moving"},
    "sage (dual)": {},
}


WITH_REFERENCES = ("with equalizer, moving anchor", "sage (dual)")


def run(program: Any, rest: tuple, state: Any) -> None:
    """One update; gives `state` away."""
    jax.block_until_ready(program(state, *rest))


def cost(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> None:
    """The update with and without our terms; also its operations as XLA counts them."""
    # The variants, each with its own program.
    variants = {n: v for n, v in VARIANTS.items() if args.references or n not in WITH_REFERENCES}
    sides = {name: Ours(make_config(args, values), mesh) for name, values in variants.items()}
    count = args.prompts * args.group
    advantages = np.random.default_rng(0).standard_normal(count).astype(np.float32)

    # One rollout for all: what is compared is the update.
    times, latents = Times(), next(iter(sides.values())).rollout()
    calls, flops = {}, {}
    for name, side in sides.items():
        rest = side.batch(latents, advantages), side.learner.frozen, NO_LIMITS, None
        program = side.programs.update.lower(side.state, *rest).compile()
        flops[name] = program.cost_analysis()["flops"]
        calls[name] = functools.partial(run, program, rest)
        # Once, to warm up.
        calls[name](side.copy_of_state())
        print(f"compiled: {name}", flush=True)

    # In turn, so that what else the machine does falls on all of them.
    for _ in range(args.repeats):
        for name, side in sides.items():
            state = side.copy_of_state()
            times(name, functools.partial(calls[name], state))

    print("\n| update | operations | CPU | wall |\n|---|---|---|---|")
    for name in sides:
        share = flops[name] / flops["plain GRPO"] - 1
        cpu, wall = (against_plain(seconds, name) for seconds in (times.cpu, times.wall))
        print(f"| {name} | {100 * share:+.2f} % | {cpu} | {wall} |")


def against_plain(seconds: dict[str, list[float]], name: str) -> str:
    """Median, and the mean of the repeats' differences to plain GRPO with its standard error."""
    mine, plain = np.array(seconds[name]), np.array(seconds["plain GRPO"])
    relative = 100 * (mine - plain) / np.median(plain)
    error = relative.std(ddof=1) / np.sqrt(len(relative))
    return f"{np.median(mine):.3f} s, {relative.mean():+.1f} ± {error:.1f} %"


def profile(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> None:
    """Time by operation, and how much of it has only one thread at work."""
    # Compiled before anything is measured.
    ours = Ours(make_config(args, {"trust_region.kind": "none"}), mesh)
    advantages = np.ones(ours.config.batch_size, np.float32)
    latents = ours.rollout()
    batch = ours.batch(latents, advantages)
    ours.update(ours.copy_of_state(), batch)

    for name, function in (
        ("rollout", lambda state: ours.rollout()),
        ("update", lambda state: ours.update(state, batch)),
    ):
        for _ in range(args.repeats):
            state = ours.copy_of_state()
            print_threads(name, lambda s=state, f=function: f(s))
        state = ours.copy_of_state()
        # A run of its own for the trace: tracing slows down what it traces.
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                function(state)
            (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
            print_profile(name, jax.profiler.ProfileData.from_file(str(path)))


def thread_seconds() -> dict[str, np.ndarray]:
    """(ran, waited for a core) in seconds for every thread of this process (Linux)."""
    found = {}
    for path in pathlib.Path("/proc/self/task").glob("*/schedstat"):
        # Nanoseconds on a core and in the queue for one, and how often it was there.
        ran, waited, _ = path.read_text().split()
        found[path.parent.name] = np.array([int(ran), int(waited)]) / 1e9
    return found


def print_threads(name: str, function: Callable[[], Any]) -> None:
    """How many threads had work: those that ran and those that waited for a core count.

    This holds on a busy machine too, where CPU time over wall time does not.
    """
    before, start = thread_seconds(), time.perf_counter()
    function()
    wall, after = time.perf_counter() - start, thread_seconds()
    spent = [after[t] - before.get(t, 0.0) for t in after]
    ran, waited = np.sum(spent, axis=0)
    busiest = max(x[0] for x in spent)
    print(
        f"\n{name}: {wall:.2f} s, {ran:.2f} s on a core, {waited:.2f} s waiting for one; threads "
        f"with work: {(ran + waited) / wall:.2f}; the busiest did {100 * busiest / ran:.0f} %"
    )


# Not operations, but what holds or schedules them.
CONTAINERS = ("ThunkExecutor", "while", "call", "end:", "SlinkyThreadPool", "ThreadpoolListener")


def print_profile(name: str, data: jax.profiler.ProfileData) -> None:
    """Operations by thread time, and for how long each was the only one at work."""
    # Beginnings (+1) and ends (-1) of all operations on all threads of XLA's pool.
    edges = []
    for plane in data.planes:
        for line in plane.lines:
            if "XLAEigen" not in line.name:
                continue
            for event in line.events:
                if not event.name.startswith(CONTAINERS):
                    kind = event.name.split(".")[0]
                    edges.append((event.start_ns, 1, kind))
                    edges.append((event.start_ns + event.duration_ns, -1, kind))

    # Between two edges nothing changes: the time goes to all that are at work.
    edges.sort(key=lambda edge: edge[:2])
    busy, alone, by_count = collections.Counter(), collections.Counter(), collections.Counter()
    running, last = collections.Counter(), edges[0][0]
    for now, change, kind in edges:
        working = +running
        by_count[working.total()] += now - last
        for other, count in working.items():
            busy[other] += count * (now - last)
            alone[other] += (now - last) * (working.total() == 1)
        running[kind] += change
        last = now

    wall = sum(by_count.values())
    shares = ", ".join(f"{n}: {100 * by_count[n] / wall:.0f} %" for n in sorted(by_count))
    print(
        f"\n{name}: {wall / 1e9:.2f} s; share of it by the number of operations at work: {shares}"
    )
    print("| operation | thread time | of it alone |\n|---|---|---|")
    for kind, total in busy.most_common(10):
        print(f"| {kind} | {total / 1e9:.3f} s | {100 * alone[kind] / total:.0f} % |")


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--part", choices=("cost", "profile"), default="cost")
    arguments.add_argument(
        "--references", type=int, default=1, help="0: leave the updates with KL forwards out"
    )
    args = arguments.parse_args()
    mesh = open_mesh(args)
    with jax.set_mesh(mesh):
        {"cost": cost, "profile": profile}[args.part](args, mesh)


if __name__ == "__main__":
    main()
