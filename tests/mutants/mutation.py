"""Runs tests on copies of a tree that have one fault each. See `run.py` for the command."""

from __future__ import annotations

import compileall
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import py_compile
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from fault_table import Fault

PACKAGE = "sage_grpo_jax"
# Outcomes. A fault that breaks the program everywhere (a name that is not there, a module that
# cannot be imported) says nothing about the tests: it is an error of the table, not a kill.
# Nor does a test that fails without the fault too.
KILLED, TIMEOUT, SURVIVED = "killed", "timeout", "SURVIVED"
BROKEN, DOUBTFUL = "BROKEN", "DOUBTFUL"
_BREAKS = ("NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "SyntaxError")
_LEFT_OUT = ("runs", "build", "__pycache__")


class TreeError(RuntimeError):
    """The tests cannot be run; one line."""


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
    """A copy of a tree in a temporary folder, in which tests run. Close it."""

    def __init__(
        self,
        source: pathlib.Path,
        folder: pathlib.Path,
        package: str = PACKAGE,
        libraries: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
          source: the tree; only read.
          folder: gets the copy; must not exist.
          package: in the tree; the tests must import it from the copy.
          libraries: modules from elsewhere that are imported once for all tests.
          environment: of the tests, beside that of this process.
        """
        self._root, self._package = folder.resolve(), package
        shutil.copytree(source, self._root, ignore=_ignored, symlinks=True)
        # Bytecode is recognised by seconds and size, as a rule: a quick change of a sign has both
        # alike. Here it is recognised by a checksum of the source, now and when it is made anew.
        checked = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(self._root / package, quiet=2, invalidation_mode=checked)
        self._report = self._root.with_suffix(".json")
        self._environment = {**os.environ, **(environment or {}), **self._paths()}
        self._libraries = tuple(libraries)
        self._warm: subprocess.Popen | None = None
        self._group: int | None = None  # of the processes of the tests that run now

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._warm is not None:
            self._warm.kill()
            self._warm.communicate()

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
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "first_failure"]
        code, output = self._run([*options, *tests], timeout)
        report = json.loads(self._report.read_text()) if self._report.exists() else {}
        package = report.get("package", str(self._root / self._package))
        if pathlib.Path(package) != self._root / self._package:
            raise TreeError(f"the tests imported {package}, not the copy in {self._root}")
        return code, report, output

    def stop(self) -> None:
        """Ends the tests that run now, and whatever they started."""
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)

    def _run(self, arguments: list[str], timeout: float) -> tuple[int | None, str]:
        """Exit code (None: ended by us) and output."""
        output = self._root.with_suffix(".log")
        if self._warm is None:
            self._warm = self._started()
        self._send({"arguments": arguments, "output": str(output)})
        self._group = self._receive()["pid"]
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self.stop()))
        timer.start()
        try:
            code = self._receive()["code"]
        finally:
            timer.cancel()
            self.stop()  # what the tests left behind
            self._group = None
        return None if late.is_set() else code, output.read_text(errors="replace")

    def _started(self) -> subprocess.Popen:
        """The process that has imported the libraries."""
        program = pathlib.Path(__file__).with_name("warm.py")
        return subprocess.Popen(
            [sys.executable, str(program), *self._libraries],
            cwd=self._root,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _send(self, request: dict) -> None:
        self._warm.stdin.write(json.dumps(request) + "\n")
        self._warm.stdin.flush()

    def _receive(self) -> dict:
        line = self._warm.stdout.readline()
        if not line:
            raise TreeError(f"the process that runs the tests ended with {self._warm.wait()}")
        return json.loads(line)

    def _paths(self) -> dict[str, str]:
        plugin = str(pathlib.Path(__file__).resolve().parent)
        return {
            # Before an editable install, which leads to the tree itself.
            "PYTHONPATH": os.pathsep.join([str(self._root), plugin]),
            "MUTATION_REPORT": str(self._report),
            "MUTATION_PACKAGE": self._package,
        }


def _ignored(folder: str, names: list[str]) -> list[str]:
    """Hidden files, results and virtual environments stay behind."""
    hidden = [name for name in names if name.startswith(".") or name in _LEFT_OUT]
    places = [name for name in names if (pathlib.Path(folder) / name / "pyvenv.cfg").exists()]
    return hidden + places


class Confirmed:
    """What tests do without a fault: they are run once."""

    def __init__(self) -> None:
        self._passed: dict[tuple[str, ...], bool] = {}

    def pass_in(self, tree: Tree, tests: Sequence[str], timeout: float) -> bool:
        if tuple(tests) not in self._passed:
            code, _, _ = tree.test(tests, timeout)
            self._passed[tuple(tests)] = code == 0
        return self._passed[tuple(tests)]


def try_fault(
    tree: Tree, fault: Fault, tests: Sequence[str], timeout: float, confirmed: Confirmed
) -> Result:
    """Runs the tests with the fault in the tree; the one that notices it also without."""
    result = _faulty(tree, fault, tests, timeout)
    if result.noticed:
        noticed = [result.test] if result.test else tests
        if not confirmed.pass_in(tree, noticed, timeout):
            return dataclasses.replace(result, outcome=DOUBTFUL)
    return result


def _faulty(tree: Tree, fault: Fault, tests: Sequence[str], timeout: float) -> Result:
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
    confirmed = Confirmed()
    idle: queue.Queue[Tree] = queue.Queue()
    for tree in trees:
        idle.put(tree)

    def one(fault: Fault) -> Result:
        tree = idle.get()
        try:
            return try_fault(tree, fault, tests or fault.tests, timeout, confirmed)
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
