"""One layout of docstrings; CONTRIBUTING.md describes it, ruff's rules check the rest of it."""

import ast
import pathlib
import re

import pytest

import sage_grpo_jax

PACKAGE = pathlib.Path(sage_grpo_jax.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "_pb2" not in path.name]
SECTIONS = ("Attributes", "Args", "Returns", "Yields", "Raises")  # in this order
# What others call their sections, and one of ours with something behind it.
STRANGE = re.compile(
    r"(?:(?:Arguments?|Arg|Parameters|Params|Return|Raise|Yield|Examples?|Notes?):"
    rf"|(?:{'|'.join(SECTIONS)}):.+)"
)
ENTRY = re.compile(r"([*.\w]+(?:, [*.\w]+)*): \S")


def problems(source: str) -> list[str]:
    """What is wrong with the docstrings of a file, with the line of its function or class."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node) or ""
            if isinstance(node, ast.FunctionDef) and node.name == "__init__" and text:
                found.append(f"{node.lineno}: __init__: its Args belong to the class")
            found += [f"{node.lineno}: {node.name}: {said}" for said in _of_text(node, text)]
    return found


def _of_text(node: ast.AST, text: str) -> list[str]:
    lines, found, order = text.splitlines(), [], []
    for number, line in enumerate(lines):
        if STRANGE.fullmatch(line):
            found.append(f"no section of ours: {line}")
        if line.removesuffix(":") not in SECTIONS or not line.endswith(":"):
            continue
        section = line.removesuffix(":")
        order.append(SECTIONS.index(section))
        if number == 0 or lines[number - 1]:
            found.append(f"{line} without an empty line before it")
        found += _of_section(node, section, lines[number + 1 :])
    if order != sorted(set(order)):
        found.append(f"sections in the order {[SECTIONS[i] for i in order]}")
    return found


def _of_section(node: ast.AST, section: str, lines: list[str]) -> list[str]:
    """Entries stand two columns in, what they go on with four or more."""
    found, entries = [], 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line or indent == 0:
            break
        if indent == 2:
            entries += 1
            if section != "Returns" and section != "Yields":
                found += _of_entry(node, section, line.strip())
        elif indent < 4 or not entries:
            found.append(f"{section}: {indent} columns before {line.strip()!r}")
    return found if entries else [f"{section}: nothing in it"]


def _of_entry(node: ast.AST, section: str, line: str) -> list[str]:
    entry = ENTRY.match(line)
    if not entry:
        return [f"{section}: no name and colon in {line!r}"]
    names = entry[1].split(", ")
    if section == "Raises":
        own = [name.rpartition(".")[2] for name in names]  # behind the module
        return [f"{name} is no exception" for name in own if not name[0].isupper()]
    return [f"{section}: there is no {name}" for name in names if name not in _known(node)]


def _known(node: ast.AST) -> set[str]:
    """Parameters of a function; of a class those of `__init__`, its fields and its attributes."""
    if not isinstance(node, ast.ClassDef):
        given = node.args
        plain = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        starred = {f"*{given.vararg.arg}"} if given.vararg else set()
        return plain | starred | ({f"**{given.kwarg.arg}"} if given.kwarg else set())
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            found |= {part.name} | (_known(part) if part.name == "__init__" else set())
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found.add(part.target.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            found.add(part.attr)
    return found


def test_layout():
    found = [
        f"{path.relative_to(PACKAGE)}:{said}"
        for path in FILES
        for said in problems(path.read_text())
    ]
    assert not found, "\n".join(found)


GOOD = '''
def f(a, b, *rest):
    """Adds.

    Args:
      a, b: numbers; a sentence that is
        longer.
      *rest: more of them.

    Returns:
      Their sum.

    Raises:
      ValueError: never.
    """
'''


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a, b:", "a, c:", "Args: there is no c"),
        ("*rest:", "rest:", "Args: there is no rest"),
        ("      a, b", "        a, b", "Args: 4 columns before 'a, b"),
        ("        longer", "     longer", "Args: 1 columns before 'longer"),
        ("Args:", "Arguments:", "no section of ours: Arguments:"),
        ("Returns:\n      Their", "Returns: their", "no section of ours: Returns: their sum."),
        ("Raises:", "Attributes:", "sections in the order"),
        ("ValueError: never", "never", "Raises: no name and colon in 'never.'"),
        ("ValueError:", "error:", "error is no exception"),
        ("\n\n    Returns:", "\n    Returns:", "Returns: without an empty line"),
        ("      Their sum.\n", "", "Returns: nothing in it"),
        ("def f(a, b,", "def __init__(a, b,", "its Args belong to the class"),
    ],
)
def test_the_test_sees(old, new, said):
    assert not problems(GOOD)
    assert said in "; ".join(problems(GOOD.replace(old, new)))
