"""The table of faults fits the tree; a fault that breaks the whole program is no kill."""

import contextlib
import pathlib
import textwrap

import fault_table
import mutation
import pytest
import run


def problems(faults):
    """What is wrong with each of them."""
    found = []
    for fault in faults:
        try:
            fault_table.check(fault)
        except fault_table.TableError as error:
            found.append(str(error))
    return found


def test_every_fault_fits_the_tree():
    faults = fault_table.read()
    assert not problems(faults)
    groups = {fault.name.partition("/")[0] for fault in faults}
    assert groups >= {
        "flow",
        "grpo",
        "update",
        "learner",
        "data",
        "rewards",
        "conversion",
        "resume",
    }
    assert sum(not fault.equivalent for fault in faults) >= 60


def test_the_document_shows_the_table():
    text = fault_table.DOCUMENT.read_text()
    wanted = fault_table.documented(text, fault_table.read())
    assert text == wanted, "bash launch/mutants.sh --table writes it"


def fault(**changes) -> fault_table.Fault:
    fields = {"name": "a/b", "file": "small/code.py", "old": "a + b", "new": "a - b"}
    return fault_table.Fault(**{**fields, "tests": ("code_test.py",), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": "a +  b"}, r"a/b: 'a \+  b' occurs 0 times in small/code.py; allowed: once"),
        ({"old": "return"}, "occurs 2 times"),
        ({"new": "a + b"}, "old and new are the same"),
        ({"new": "a +"}, "small/code.py would be no Python"),
        ({"file": "small/other.py"}, "there is no small/other.py"),
        ({"tests": ("other_test.py",)}, "there is no other_test.py"),
        ({"tests": ("code_test.py::test_other",)}, "code_test.py has no test_other"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tree, changes, message):
    fault_table.check(fault(), tree)
    fault_table.check(fault(tests=("code_test.py::test_sum",)), tree)
    with pytest.raises(fault_table.TableError, match=message):
        fault_table.check(fault(**changes), tree)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('name = "a"\nfile = "f"\nold = "x"\nnew = "y"', "either tests or the reason"),
        ('name = "a"\nfile = "f"\nold = "x"\ntests = ["t"]', "new is None; allowed: text"),
        ('name = "a"\nfile = "f"\nold = "x"\nnew = "y"\ntest = ["t"]', "unknown field test"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, entry, message):
    (tmp_path / "some.toml").write_text(f"[[fault]]\n{entry}\n")
    with pytest.raises(fault_table.TableError, match=f"some.toml, 'a': .*{message}"):
        fault_table.read(tmp_path)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> pathlib.Path:
    """A small package with its test, which needs no plugins of others."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    files = {
        "small/__init__.py": "",
        "small/code.py": """
            def add(a, b):
                return a + b

            def count(n):
                return range(n)
            """,
        "code_test.py": """
            from small import code

            def test_sum():
                for _ in code.count(1):
                    assert code.add(2, 3) == 5
            """,
        ".git/config": "",
    }
    for name, text in files.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path / "source"


def test_outcomes(tree, tmp_path):
    copy = mutation.Tree(tree, tmp_path / "copy", "small")
    assert not (tmp_path / "copy" / ".git").exists()
    before = (tree / "small" / "code.py").read_text()
    loop, endless = "range(n)", "iter(int, 1)"
    cases = {
        "killed": fault(),
        "survived": fault(new="b + a"),
        "nameless": fault(new="a + c"),
        "raises": fault(new="a[b]"),
        "no import": fault(old="def add(a, b):", new="import nothing\ndef add(a, b):"),
        "hangs": fault(old=loop, new=endless),
    }
    # Only the one that hangs waits for its time limit.
    confirmed = mutation.Confirmed()
    with copy:
        found = {
            name: mutation.try_fault(
                copy, case, case.tests, 5 if name == "hangs" else 600, confirmed
            )
            for name, case in cases.items()
        }
    assert {name: (result.outcome, result.error) for name, result in found.items()} == {
        "killed": (mutation.KILLED, "AssertionError"),
        "survived": (mutation.SURVIVED, ""),
        "nameless": (mutation.BROKEN, "NameError"),
        "raises": (mutation.KILLED, "TypeError"),
        "no import": (mutation.BROKEN, "E   ModuleNotFoundError: No module named 'nothing' in "
                      "collection"),
        "hangs": (mutation.TIMEOUT, ""),
    }  # fmt: skip
    assert found["killed"].test == "code_test.py::test_sum"
    assert (tree / "small" / "code.py").read_text() == before
    assert (tmp_path / "copy" / "small" / "code.py").read_text() == before
    assert run._summarise([found["killed"], found["hangs"]], 0) == 0
    assert run._summarise([found["killed"], found["survived"]], 0) == 1
    assert run._summarise([found["nameless"]], 0) == 1


def test_tests_that_fail_anyway_and_foreign_packages_are_refused(tree, tmp_path):
    (tree / "wrong_test.py").write_text("def test_wrong():\n    assert False\n")
    with mutation.Tree(tree, tmp_path / "copy", "small") as copy:
        anyway = mutation.try_fault(copy, fault(), ["wrong_test.py"], 600, mutation.Confirmed())
    assert (anyway.outcome, anyway.test) == (mutation.DOUBTFUL, "wrong_test.py::test_wrong")
    assert run._summarise([anyway], 0) == 2
    # A package that was installed from elsewhere, as an editable install does it.
    with (
        mutation.Tree(tree, tmp_path / "other", "json") as foreign,
        pytest.raises(mutation.TreeError, match=r"the tests imported .*json, not the copy"),
    ):
        foreign.test(["code_test.py"], 600)


def test_several_copies_share_the_work(tree, tmp_path):
    faults = [fault(name=f"a/{i}", new=f"a + b + {i}") for i in range(4)]
    told = []
    with contextlib.ExitStack() as stack:
        trees = [mutation.Tree(tree, tmp_path / f"copy{i}", "small") for i in range(2)]
        trees = [stack.enter_context(copy) for copy in trees]
        results = mutation.try_all(trees, faults, 600, None, told.append)
    assert told == results
    outcomes = {result.fault: result.outcome for result in results}
    assert outcomes == {"a/0": mutation.SURVIVED} | dict.fromkeys(
        ("a/1", "a/2", "a/3"), mutation.KILLED
    )


def test_faults_come_in_the_order_of_the_filters():
    faults = [fault(name=name) for name in ("a/sign", "a/step", "b/sign")]
    names = [f.name for f in run._chosen(faults, ["b/", "sign"])]
    assert names == ["b/sign", "a/sign"]
    assert run._chosen(faults, []) == faults
    with pytest.raises(fault_table.TableError, match="no fault has 'axis' in its name"):
        run._chosen(faults, ["sign", "axis"])


def test_faulty_programs_do_not_go_among_those_of_the_tests(tmp_path, monkeypatch):
    (tmp_path / "of tests").mkdir()
    (tmp_path / "of tests" / "program").write_bytes(b"compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "of tests"))
    environment = run._compiled(tmp_path / "copy")
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "copy")
    assert (tmp_path / "copy" / "program").read_bytes() == b"compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "not yet there"))
    run._compiled(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())
