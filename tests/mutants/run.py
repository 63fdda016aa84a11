"""Puts faults into copies of this tree, one at a time, and tells which ones no test notices.

Called by launch/mutants.sh. Exit codes: 0 all noticed; 1 a fault survived (or broke the program,
which says nothing); 2 the table does not fit the tree, or a test fails without the fault too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile

import fault_table
import mutation

# What tests import from elsewhere, and what takes a second or starts no threads.
_LIBRARIES = (
    "hypothesis",
    "jax",
    "flax.linen",
    "optax",
    "chex",
    "orbax.checkpoint",
    "grain",
    "ml_collections",
    "grpc",
    "safetensors.numpy",
    "tensorboardX",
    "torch",
    "diffusers",
    "transformers",
)
_ASSERTIONS = ("AssertionError", "Failed")  # pytest.raises and pytest.fail raise the second


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # As an interrupt from the keyboard: the tests end, the copies are removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        faults = _chosen(fault_table.read(), options.filters)
        for fault in faults:
            fault_table.check(fault)
        if options.table:
            text = fault_table.DOCUMENT.read_text()
            fault_table.DOCUMENT.write_text(fault_table.documented(text, fault_table.read()))
            return 0
        if options.list:
            for fault in faults:
                print(f"{fault.name:40s} {fault.equivalent or ' '.join(fault.tests)}")
            return 0
        return _try(faults, options)
    except KeyboardInterrupt:
        return 130
    except (fault_table.TableError, mutation.TreeError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/mutants.sh", description=__doc__)
    parser.add_argument("filters", nargs="*", help="parts of names; all faults by default")
    parser.add_argument("--list", action="store_true", help="show names and tests, run nothing")
    parser.add_argument("--table", action="store_true", help="write the table of docs/testing.md")
    parser.add_argument("--jobs", type=_positive, default=1, help="copies at work (default 1)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the results")
    parser.add_argument("--full", action="store_true", help="run the whole quick suite on each")
    parser.add_argument(
        "--timeout", type=_positive, default=900, help="seconds for a fault (default 900)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: at least 1")
    return value


def _chosen(faults: list[fault_table.Fault], filters: list[str]) -> list[fault_table.Fault]:
    for text in filters:
        if not any(text in fault.name for fault in faults):
            raise fault_table.TableError(f"no fault has {text!r} in its name; see --list")
    if not filters:
        return faults
    # In the order of the filters.
    found = {f.name: f for text in filters for f in faults if text in f.name}
    return list(found.values())


def _try(faults: list[fault_table.Fault], options: argparse.Namespace) -> int:
    run = [fault for fault in faults if not fault.equivalent]
    if not run:
        print(f"{len(faults)} equivalent faults; nothing to run")
        return 0
    tests = ["tests"] if options.full else None
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        environment = _compiled(folder / "compiled")
        trees = []
        for i in range(min(options.jobs, len(run))):
            tree = mutation.Tree(
                fault_table.ROOT, folder / f"tree{i}", libraries=_LIBRARIES, environment=environment
            )
            trees.append(stack.enter_context(tree))
        print(f"{len(run)} faults", flush=True)
        results = mutation.try_all(trees, run, options.timeout, tests, _tell)
    if options.json:
        rows = [dataclasses.asdict(result) for result in results]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return _summarise(results, len(faults) - len(run))


def _compiled(folder: pathlib.Path) -> dict[str, str]:
    """A copy of the compiled programs of the tests, so that faulty ones do not go among them.

    It also takes those that compile at once: every fault would compile them again.
    """
    variable = "JAX_COMPILATION_CACHE_DIR"
    name = f"sage_grpo_jax_test_cache_{os.getuid()}"  # as in tests/conftest.py
    source = pathlib.Path(os.environ.get(variable, pathlib.Path(tempfile.gettempdir()) / name))
    folder.mkdir()
    if source.is_dir():
        for path in source.iterdir():
            with contextlib.suppress(FileNotFoundError):  # Tests beside us may have removed it.
                shutil.copy2(path, folder / path.name)
    return {variable: str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def _tell(result: mutation.Result) -> None:
    by = f"{result.test} ({result.error})" if result.test else result.error
    print(f"{result.outcome:9s} {result.seconds:6.1f} s  {result.fault:40s} {by}", flush=True)


def _summarise(results: list[mutation.Result], equivalent: int) -> int:
    counts = collections.Counter(result.outcome for result in results)
    asserted = sum(r.outcome == mutation.KILLED and r.error in _ASSERTIONS for r in results)
    print(
        f"\n{len(results)} faults: {counts[mutation.KILLED]} killed ({asserted} by an assertion, "
        f"the others by another exception), {counts[mutation.TIMEOUT]} by timeout, "
        f"{counts[mutation.SURVIVED]} survived, {counts[mutation.BROKEN]} broke the program, "
        f"{counts[mutation.DOUBTFUL]} noticed by a test that fails without it too; "
        f"{equivalent} equivalent ones were not run"
    )
    for result in results:
        if not result.noticed:
            print(f"  {result.outcome} {result.fault} {result.error}")
    if counts[mutation.DOUBTFUL]:
        return 2
    return 0 if all(result.noticed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
