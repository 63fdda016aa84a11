"""The rooms of the package: who imports whom, and no circles; docs/architecture.md draws them."""

import ast
import pathlib

import sage_grpo_jax

PACKAGE = pathlib.Path(sage_grpo_jax.__file__).parent
# From the top down; a room imports itself and rooms below it. Entries import all of them.
ROOMS = (
    "experiments",
    "checks",
    "sampling",
    "pretraining",
    "training",
    "policy",
    "config",
    "rewards",
    "text_encoders",
    "worlds",
    "data",
    "weights",
    "parallel",
    "models",
    "grpo",
    "flow",
    "common",
)
# Rooms within a room, from the top down, below the files that lie beside them.
INNER = {"weights": ("tables", "formats")}
MAX_TRAINING_FILES = 16


def modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file of every module below the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imported(path: pathlib.Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere, behind TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sage_grpo_jax"):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("sage_grpo_jax.") for name in names}
    return {name for name in found if name in known}


GRAPH = {name: imported(path, set(modules())) for name, path in modules().items()}


def room(module: str) -> str:
    return module.partition(".")[0] if "." in module else ""


def test_every_folder_is_a_room_with_a_place():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders - {"assets"} == set(ROOMS)


def test_a_room_imports_only_rooms_below_it():
    upwards = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if room(module) and ROOMS.index(room(module)) > _place(other)
    ]
    assert not upwards


def _place(module: str) -> int:
    """An entry stands above all rooms: nobody imports one."""
    return ROOMS.index(room(module)) if room(module) else -1


def test_rooms_within_a_room_import_only_what_is_below_them():
    upwards = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if room(module) == room(other) in INNER and _floor(module) > _floor(other)
    ]
    assert not upwards


def _floor(module: str) -> int:
    """0 for the files of a room, then its inner rooms in their order."""
    outer, inner, *_ = module.split(".")
    return 1 + INNER[outer].index(inner) if (PACKAGE / outer / inner).is_dir() else 0


def test_inner_rooms_are_those_that_there_are():
    for outer, inner in INNER.items():
        assert {path.parent.name for path in (PACKAGE / outer).glob("*/__init__.py")} == set(inner)


def test_no_module_imports_itself_in_a_circle():
    left = {module: set(others) - {module} for module, others in GRAPH.items()}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_every_file_of_weights_has_its_test():
    names = [name for name in GRAPH if room(name) == "weights"]
    tests = pathlib.Path(__file__).parent
    assert not [n for n in names if not (tests / f"{n.replace('.', '/')}_test.py").exists()]


def test_training_is_one_step_and_the_loop_around_it():
    assert len(list((PACKAGE / "training").glob("[!_]*.py"))) <= MAX_TRAINING_FILES
