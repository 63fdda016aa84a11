"""launch/setup_host.sh: the versions of requirements.txt, with JAX for TPUs, once."""

import pathlib

import pytest
from launch_stubs import ROOT, Stubs

# An interpreter of version $VERSION: makes environments whose interpreter it is itself.
PYTHON = r"""
case "${0##*/} $1 $2" in
  *" -c "*) [ "${VERSION:-12}" -ge 11 ] ;;
  *" -m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "python3 -m pip") mkdir -p "$7/bin" && cp "$0" "$7/bin/uv" ;;
  "uv venv --seed") mkdir -p "$5/bin" && cp "$0" "$5/bin/python" ;;
esac
"""
JAX = next(
    line.partition("==")[2]
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line.startswith("jax==")
)
QUIET = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> Stubs:
    made = Stubs(tmp_path, ("python3",))
    made.behave(PYTHON)
    return made


def installed(*extras: str) -> list[list[str]]:
    return [
        ["python", *QUIET, "-r", "requirements.txt", f"jax[tpu]=={JAX}", *extras],
        ["python", *QUIET, "--no-deps", "-e", "."],
    ]


def without_checks(stubs: Stubs) -> list[list[str]]:
    return [call for call in stubs.calls() if call[1] != "-c"]


def test_it_installs_once(stubs):
    venv = str(stubs.home / "sage_grpo_jax_venv")
    assert stubs.run("setup_host.sh").status == 0
    assert without_checks(stubs) == [["python3", "-m", "venv", venv], *installed()]
    again = stubs.run("setup_host.sh")
    assert (again.status, again.err) == (0, f"{venv}: nothing to do\n")
    assert without_checks(stubs) == []


def test_other_requirements_are_installed_into_the_same_environment(stubs):
    assert stubs.run("setup_host.sh").status == 0
    stubs.calls()
    assert stubs.run("setup_host.sh", EXTRAS="gcsfs etils[epath]").status == 0
    assert without_checks(stubs) == installed("gcsfs", "etils[epath]")


def test_an_installation_that_failed_is_tried_again(stubs):
    stubs.behave(PYTHON + '[ "${0##*/}" != python ] || exit 1')
    assert stubs.run("setup_host.sh").status == 1
    stubs.behave(PYTHON)
    stubs.calls()
    assert stubs.run("setup_host.sh").status == 0
    assert without_checks(stubs) == installed()


def test_the_newest_interpreter_on_path_is_taken(stubs):
    for name in ("python3.11", "python3.13"):
        stubs.add(name)
    assert stubs.run("setup_host.sh").status == 0
    assert without_checks(stubs)[0][0] == "python3.13"


def test_an_old_machine_gets_its_python_from_uv(stubs):
    home = stubs.home
    result = stubs.run("setup_host.sh", VERSION="10", VENV=f"{home}/my venv")
    assert result.status == 0, result.err
    assert without_checks(stubs) == [
        ["python3", *QUIET, "--target", f"{home}/my venv-uv", "uv"],
        ["uv", "venv", "--seed", "--python", "3.12", f"{home}/my venv"],
        *installed(),
    ]


def test_a_dry_run_prints_what_would_be_run(stubs):
    dry = stubs.run("setup_host.sh", "--dry-run", VENV=f"{stubs.home}/my venv")
    assert dry.status == 0, dry.err
    assert without_checks(stubs) == []
    assert list(stubs.home.iterdir()) == []
    assert stubs.run("bash", "-ec", dry.out).status == 0
    printed = without_checks(stubs)
    assert printed == [["python3", "-m", "venv", f"{stubs.home}/my venv"], *installed()]


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["now"], {}, "'now': unknown word; allowed: --dry-run, --help"),
        ([], {"PYTHON": "python3", "VERSION": "10"}, "PYTHON: got 'python3'; allowed: Python 3.11"),
        ([], {"PYTHON": "no-such-python"}, "PYTHON: got 'no-such-python'"),
    ],
)
def test_bad_input_is_one_line(stubs, words, variables, message):
    result = stubs.run("setup_host.sh", *words, **variables)
    assert result.status == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert without_checks(stubs) == []
