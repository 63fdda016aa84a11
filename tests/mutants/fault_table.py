"""The faults that `launch/mutants.sh` puts into a copy of the tree: a table in TOML.

[[fault]]
name = "drift-sign"            # unique in its file; the file names the group
file = "sage_grpo_jax/flow/sde.py"
old = 'a - b'                  # occurs exactly once in the file
new = 'a + b'
tests = ["tests/flow/sde_test.py"]      # one must fail; also FILE::FUNCTION, FILE::FUNCTION[CASE]
equivalent = "why no test can see it"   # only where that is so; it is then not run
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tomllib
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(__file__).resolve().parent / "faults"
DOCUMENT = ROOT / "docs" / "testing.md"
_MARK = "<!-- bash launch/mutants.sh --table writes the rest. -->\n"
_FIELDS = {"name", "file", "old", "new", "tests", "equivalent"}


class TableError(ValueError):
    """The table does not fit the tree; one line."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One change of one line that some test must notice."""

    name: str  # "GROUP/NAME"
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def apply(self, text: str) -> str:
        """The text of `file` with the fault in it.

        Raises:
          TableError: `old` does not occur exactly once, or the result is no Python.
        """
        count = text.count(self.old)
        if count != 1:
            raise TableError(
                f"{self.name}: {self.old!r} occurs {count} times in {self.file}; allowed: once"
            )
        faulty = text.replace(self.old, self.new)
        if faulty == text:
            raise TableError(f"{self.name}: old and new are the same")
        try:
            compile(faulty, self.file, "exec")
        except SyntaxError as error:
            raise TableError(f"{self.name}: {self.file} would be no Python: {error}") from error
        return faulty


def read(folder: pathlib.Path = FOLDER) -> list[Fault]:
    """All faults, in the order of files and of the entries in them.

    Raises:
      TableError: an entry that is not as described above, or a name that was used before.
    """
    faults: dict[str, Fault] = {}
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text()).get("fault", []):
            fault = _fault(path, entry)
            if fault.name in faults:
                raise TableError(f"{path.name}: {fault.name} is there twice")
            faults[fault.name] = fault
    if not faults:
        raise TableError(f"{folder}: no faults")
    return list(faults.values())


def _fault(path: pathlib.Path, entry: dict) -> Fault:
    where = f"{path.name}, {entry.get('name')!r}"
    if unknown := sorted(entry.keys() - _FIELDS):
        raise TableError(f"{where}: unknown field {unknown[0]}; allowed: {', '.join(_FIELDS)}")
    for field in ("name", "file", "old", "new", "equivalent"):
        value = entry.get(field, "" if field == "equivalent" else None)
        if not isinstance(value, str) or (field in ("name", "file", "old") and not value):
            raise TableError(f"{where}: {field} is {value!r}; allowed: text")
    tests = entry.get("tests", [])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise TableError(f"{where}: tests is {tests!r}; allowed: a list of files")
    if bool(tests) == bool(entry.get("equivalent")):
        raise TableError(f"{where}: must have either tests or the reason why it is equivalent")
    name = f"{path.stem}/{entry['name']}"
    return Fault(**{**entry, "name": name, "tests": tuple(tests)})


def check(fault: Fault, root: pathlib.Path = ROOT) -> None:
    """Checks a fault against the tree, without running anything.

    Raises:
      TableError: file, snippet or test are not there.
    """
    path = root / fault.file
    if not path.is_file():
        raise TableError(f"{fault.name}: there is no {fault.file}")
    fault.apply(path.read_text())
    for test in fault.tests:
        file, _, function = test.partition("::")
        if not (root / file).is_file():
            raise TableError(f"{fault.name}: there is no {file}")
        function = function.partition("[")[0]
        defined = re.search(rf"^def {re.escape(function)}\(", (root / file).read_text(), re.M)
        if function and not defined:
            raise TableError(f"{fault.name}: {file} has no {function}")


def documented(text: str, faults: Iterable[Fault]) -> str:
    """A document with the table after its mark.

    Raises:
      TableError: there is no mark.
    """
    if text.count(_MARK) != 1:
        raise TableError(f"{DOCUMENT.name}: must hold once the line {_MARK.strip()}")
    return f"{text.partition(_MARK)[0]}{_MARK}\n{markdown(faults)}"


def markdown(faults: Iterable[Fault]) -> str:
    """The table of docs/testing.md: what runs, then what cannot be seen."""
    faults = list(faults)
    lines = ["| Fault | File | Change | Killed by |", "|---|---|---|---|"]
    for fault in faults:
        if not fault.equivalent:
            tests = ", ".join(dict.fromkeys(test.removeprefix("tests/") for test in fault.tests))
            file = fault.file.removeprefix("sage_grpo_jax/")
            lines.append(f"| {fault.name} | {file} | {_change(fault)} | {tests} |")
    equivalent = [fault for fault in faults if fault.equivalent]
    if equivalent:
        lines += ["", "Equivalent, and so not run:", ""]
        for fault in equivalent:
            file = fault.file.removeprefix("sage_grpo_jax/")
            lines.append(f"- {fault.name} ({file}, {_change(fault)}): {fault.equivalent}")
    return "\n".join(lines) + "\n"


def _change(fault: Fault) -> str:
    old, new = (" ".join(text.split()) for text in (fault.old, fault.new))
    return f"{_code(old)} → {_code(new)}"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "nothing"
