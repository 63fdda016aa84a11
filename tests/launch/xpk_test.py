"""launch/xpk.sh: what it prints, what it calls, what it refuses."""

import pathlib

import pytest
from launch_stubs import HOSTILE, Stubs

PLACE = {"PROJECT": "my-project", "ZONE": "us-east5", "CLUSTER": "pods", "NAME": "run-a"}
SUBMIT = PLACE | {"SLICE": "v6e:4x4", "IMAGE": "registry.example/sage:1"}
WHERE = ["--cluster=pods", "--project=my-project", "--zone=us-east5"]


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> Stubs:
    return Stubs(tmp_path)


def created(
    command: str,
    tpu: str = "v6e-4x4",
    slices: str = "1",
    priority: str = "medium",
    restarts: str = "50",
    grace: str = "600",
    capacity: tuple[str, ...] = (),
) -> list[str]:
    flags = [
        f"--tpu-type={tpu}",
        f"--num-slices={slices}",
        "--docker-image=registry.example/sage:1",
    ]
    flags += [
        f"--priority={priority}",
        f"--max-restarts={restarts}",
        "--restart-on-exit-codes=1,75",
    ]
    flags += [f"--termination-grace-period-seconds={grace}", *capacity]
    run = f"--command=exec bash launch/run_host.sh foreground {command}"
    return ["xpk", "workload", "create", *WHERE, "--workload=sage-run-a", *flags, run]


CASES = [
    (["submit", "true"], {}, created("true")),
    (["submit", "--", "true", "a b"], {}, created("true 'a b'")),
    (
        ["submit", "true"],
        {"SLICE": "v5e:2x4", "SLICES": "3", "CAPACITY": "spot", "PRIORITY": "very-low"}
        | {"MAX_RESTARTS": "0", "GRACE_SECONDS": "900", "SAVE_SECONDS": "900"},
        created(
            "true",
            tpu="v5litepod-2x4",
            slices="3",
            priority="very-low",
            restarts="0",
            grace="900",
            capacity=("--spot",),
        ),
    ),
    (
        ["submit", "true"],
        {"SLICE": "tpu7x:2x2x1", "CAPACITY": "on_demand"},
        created("true", tpu="tpu7x-2x2x1", capacity=("--on-demand",)),
    ),
    (
        ["submit", "true"],
        {"SLICE": "v5p:4x4x4", "CAPACITY": "reserved", "RESERVATION": "ours"}
        | {"LIBTPU_FLAGS": "all_to_all"},
        created(
            "env LIBTPU_INIT_ARGS=--xla_tpu_enable_async_all_to_all=true true",
            tpu="v5p-4x4x4",
            capacity=("--reservation=ours",),
        ),
    ),
    (["status"], {}, ["xpk", "workload", "list", *WHERE, "--filter-by-job=^sage-run-a$"]),
    (
        ["logs"],
        {"LINES": "7"},
        [
            *("kubectl", "logs", "--selector=jobset.sigs.k8s.io/jobset-name=sage-run-a"),
            *("--all-containers", "--prefix", "--tail=7"),
        ],
    ),
    (["delete"], {}, ["xpk", "workload", "delete", *WHERE, "--workload=sage-run-a"]),
]


@pytest.mark.parametrize(("words", "variables", "expected"), CASES)
def test_a_dry_run_prints_what_a_run_calls(stubs, words, variables, expected):
    dry = stubs.run("xpk.sh", "--dry-run", *words, **(SUBMIT | variables))
    assert dry.status == 0, dry.err
    assert stubs.calls() == []
    assert stubs.run("bash", "-ec", dry.out).status == 0
    assert stubs.calls() == [expected]

    assert stubs.run("xpk.sh", *words, **(SUBMIT | variables)).status == 0
    assert stubs.calls() == [expected]


@pytest.mark.parametrize("word", HOSTILE)
def test_a_word_of_the_command_comes_through(stubs, word):
    """XPK puts the command behind `bash -c (...) &`, in the folder of the image."""
    stubs.behave('for last; do :; done; cd "$here" && eval "(${last#--command=}) & wait $!"')
    (stubs.folder / "launch").mkdir()
    host = stubs.folder / "launch/run_host.sh"
    host.write_text("printf '<%s>' \"$@\" >received\n")
    assert stubs.run("xpk.sh", "submit", "python", word, "end", **SUBMIT).status == 0
    assert (stubs.folder / "received").read_text() == f"<foreground><python><{word}><end>"
    assert not list(stubs.folder.rglob("INJECTED"))


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "WORD: missing"),
        (["sumbit"], {}, "'sumbit': unknown word; allowed: submit, status, logs, delete"),
        (["delete", "all"], {}, "'all': unexpected word after delete"),
        (["submit"], {}, "COMMAND: missing"),
        (["submit", "a\nb"], {}, "COMMAND: it has line breaks"),
        (["submit", "true"], {"CLUSTER": ""}, "CLUSTER: missing"),
        (["delete"], {"NAME": ""}, "NAME: missing"),
        (["delete"], {"NAME": "a" * 24}, "NAME: got"),
        (["delete"], {"NAME": "A"}, "NAME: got 'A'"),
        (["submit", "true"], {"IMAGE": ""}, "IMAGE: missing"),
        (["submit", "true"], {"SLICE": ""}, "SLICE: missing"),
        (["submit", "true"], {"SLICE": "v6e:2x2x2"}, "2 dimensions for a v6e"),
        (["submit", "true"], {"SLICE": "tpu7x:2x2"}, "3 dimensions for a tpu7x"),
        (["submit", "true"], {"PRIORITY": "highest"}, "PRIORITY: got 'highest'"),
        (["submit", "true"], {"CAPACITY": "cheap"}, "CAPACITY: got 'cheap'"),
        (["submit", "true"], {"CAPACITY": "reserved"}, "RESERVATION: missing"),
        (["submit", "true"], {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: got '-1'"),
        (["submit", "true"], {"GRACE_SECONDS": "299"}, "at least SAVE_SECONDS, 300"),
        (["submit", "true"], {"SAVE_SECONDS": "601"}, "GRACE_SECONDS: got 600; allowed: at least"),
        (["submit", "true"], {"LIBTPU_FLAGS": "faster"}, "GROUP: got 'faster'"),
        (["logs"], {"LINES": "x"}, "LINES: got 'x'"),
    ],
)
def test_bad_input_is_one_line_before_any_call(stubs, words, variables, message):
    result = stubs.run("xpk.sh", *words, **(SUBMIT | variables))
    assert result.status == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.count("\n") == 1
    assert stubs.calls() == []


@pytest.mark.parametrize(("word", "program"), [("submit", "xpk"), ("logs", "kubectl")])
def test_without_its_program_it_says_so(tmp_path, word, program):
    stubs = Stubs(tmp_path, ())
    command = ["true"] if word == "submit" else []
    result = stubs.run("xpk.sh", word, *command, **SUBMIT)
    assert result.status == 2
    assert result.err.startswith(f"error: {program}: not found on PATH")
