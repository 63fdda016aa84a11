"""Runs tests on copies of a tree that have one fault each. See `run.py` for the command."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from fault_table import Fault

PACKAGE = "sage_grpo_jax"
# Outcomes. A fault that breaks the program everywhere (a name that is not there, a module that
# cannot be imported) says nothing about the tests: it is an error of the table, not a kill.
KILLED, TIMEOUT, SURVIVED, BROKEN = "killed", "timeout", "SURVIVED", "BROKEN"
_BREAKS = ("NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "SyntaxError")
_LEFT_OUT = ("runs", "build", "__pycache__")


class TreeError(RuntimeError):
    """The tests cannot be run, or fail without any fault; one line and what pytest wrote."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one fault."""

    fault: str
    outcome: str
    seconds: float
    test: str = ""  # the first that failed
    error: str = ""  # the type of its exception, with the phase where it is not the call

    @property
    def noticed(self) -> bool:
        return self.outcome in (KILLED, TIMEOUT)


class Tree:
    """A copy of a tree in a temporary folder, in which tests run."""

    def __init__(self, source: pathlib.Path, folder: pathlib.Path, package: str = PACKAGE) -> None:
        """
        Args:
          source: the tree; only read.
          folder: gets the copy; must not exist.
          package: in the tree; the tests must import it from the copy.
        """
        self._root, self._package = folder.resolve(), package
        shutil.copytree(source, self._root, ignore=_ignored, symlinks=True)
        self._report = self._root.with_suffix(".json")
        self._process: subprocess.Popen | None = None

    @contextlib.contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """The fault is in the copy within the block."""
        path = self._root / fault.file
        text = path.read_text()
        try:
            path.write_text(fault.apply(text))
            yield
        finally:
            path.write_text(text)

    def test(self, tests: Sequence[str], timeout: float) -> tuple[int | None, dict, str]:
        """Runs pytest until the first failure.

        Returns:
          (exit code, or None after `timeout` seconds; what `first_failure` found; the output)

        Raises:
          TreeError: another package than the copy's was tested.
        """
        self._report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header"]
        command += ["-p", "no:cacheprovider", "-p", "first_failure", *tests]
        code, output = self._run(command, timeout)
        report = json.loads(self._report.read_text()) if self._report.exists() else {}
        package = report.get("package", str(self._root / self._package))
        if pathlib.Path(package) != self._root / self._package:
            raise TreeError(f"the tests imported {package}, not the copy in {self._root}")
        return code, report, output

    def stop(self) -> None:
        """Ends the tests that run now, and whatever they started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _run(self, command: list[str], timeout: float) -> tuple[int | None, str]:
        """Exit code (None: ended by us) and output."""
        with tempfile.TemporaryFile("w+") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self._root,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                self.stop()
                self._process.wait()
            output.seek(0)
            return code, output.read()

    def _environment(self) -> dict[str, str]:
        plugin = str(pathlib.Path(__file__).resolve().parent)
        return {
            **os.environ,
            # Before an editable install, which leads to the tree itself.
            "PYTHONPATH": os.pathsep.join([str(self._root), plugin]),
            # Bytecode is recognised by seconds and size: a quick change of a sign has both alike.
            "PYTHONDONTWRITEBYTECODE": "1",
            "MUTATION_REPORT": str(self._report),
            "MUTATION_PACKAGE": self._package,
        }


def _ignored(folder: str, names: list[str]) -> list[str]:
    """Hidden files, results and virtual environments stay behind."""
    hidden = [name for name in names if name.startswith(".") or name in _LEFT_OUT]
    places = [name for name in names if (pathlib.Path(folder) / name / "pyvenv.cfg").exists()]
    return hidden + places


def check_unchanged(tree: Tree, tests: Sequence[str], timeout: float) -> float:
    """Seconds that the tests take without a fault.

    Raises:
      TreeError: they do not pass.
    """
    started = time.monotonic()
    code, report, output = tree.test(tests, timeout)
    if code != 0:
        what = f"{report['test']} fails" if "test" in report else f"pytest ended with {code}"
        raise TreeError(f"without any fault {what}:\n{output[-4000:]}")
    return time.monotonic() - started


def try_fault(tree: Tree, fault: Fault, tests: Sequence[str], timeout: float) -> Result:
    """Runs the tests with the fault in the tree."""
    started = time.monotonic()
    with tree.fault(fault):
        code, report, output = tree.test(tests, timeout)
    seconds = time.monotonic() - started
    if code is None:
        return Result(fault.name, TIMEOUT, seconds)
    if code == 0:
        return Result(fault.name, SURVIVED, seconds)
    test, phase = report.get("test", ""), report.get("phase", "")
    error = report.get("error") or f"pytest ended with {code}: {output.strip()[-300:]}"
    broken = not test or phase == "collection" or error in _BREAKS
    shown = error if phase in ("call", "") else f"{error} in {phase}"
    return Result(fault.name, BROKEN if broken else KILLED, seconds, test, shown)


def try_all(
    trees: Sequence[Tree],
    faults: Sequence[Fault],
    timeout: float,
    tests: Sequence[str] | None,
    tell: Callable[[Result], None],
) -> list[Result]:
    """Tries all faults, as many at a time as there are trees.

    Args:
      trees: copies of the same tree.
      faults: in any order.
      timeout: seconds for one fault.
      tests: what runs for every fault; None: what each one names.
      tell: is called with each result as it comes.
    """
    idle: queue.Queue[Tree] = queue.Queue()
    for tree in trees:
        idle.put(tree)

    def one(fault: Fault) -> Result:
        tree = idle.get()
        try:
            return try_fault(tree, fault, tests or fault.tests, timeout)
        finally:
            idle.put(tree)

    results = []
    with concurrent.futures.ThreadPoolExecutor(len(trees)) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(one, f) for f in faults]):
                results.append(future.result())
                tell(results[-1])
        except BaseException:
            # An interrupt, or an error of ours: nothing goes on in the background.
            pool.shutdown(wait=False, cancel_futures=True)
            for tree in trees:
                tree.stop()
            raise
    return results
