"""launch/babysit.sh against a cloud that takes slices away and runs that end in all ways."""

import pathlib

import pytest
from launch_stubs import PLACE, Stubs

VARIABLES = PLACE | {"SLICE": "v6e:4x4", "POLL_SECONDS": "0"}
COMMAND = ["python", "-m", "sage_grpo_jax.train", "--workdir=/mnt/runs/a b"]
# States of the slice come from `states`, reports of its two workers from `reports`, a line a look;
# FAIL in either makes the call fail. `git` archives nothing.
BEHAVIOUR = r"""
case "${0##*/} $4" in
  "gcloud list")
    state=$(pop states)
    [ "$state" != FAIL ] || exit 1
    [ "$state" = NONE ] || printf 'run-a\t%s\tsage_grpo_jax\n' "$state"
    ;;
  "gcloud create") [ ! -e "$here/no_create" ] || exit 1 ;;
  "gcloud ssh")
    case "$*" in
      *"run_host.sh status"*)
        report=$(pop reports)
        [ "$report" != FAIL ] || exit 1
        number=0
        IFS=, read -r -a words <<<"$report"
        for word in "${words[@]}"; do echo "worker w$((number++)): $word"; done
        ;;
    esac
    ;;
esac
[ "${0##*/}" != git ] || case "$*" in *archive*) touch "${5#--output=}" ;; esac
"""


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> Stubs:
    made = Stubs(tmp_path, ("gcloud", "git"))
    made.behave(BEHAVIOUR)
    return made


def babysit(stubs: Stubs, states: list[str], reports: list[str], **variables: str):
    """The result, and what was done: create, delete, setup, run, stop, logs."""
    stubs.queue("states", *states)
    stubs.queue("reports", *reports)
    result = stubs.run("babysit.sh", *COMMAND, **(VARIABLES | variables))
    done = []
    for call in stubs.calls():
        if call[0] != "gcloud" or call[4] in ("list", "scp"):
            continue
        if call[4] != "ssh":
            done.append(call[4])
            continue
        command = call[-1].removeprefix("--command=")
        if command.startswith("mkdir"):
            done.append("setup")
        elif (word := command.split()[2]) != "status":
            done.append({"start": "run"}.get(word, word))
            if word == "start":
                assert command.endswith(
                    "start python -m sage_grpo_jax.train '--workdir=/mnt/runs/a b'"
                )
    return result, done


# The looks of one go: babysit asks for the state, tpu_vm.sh create and status and delete do so too.
NEW = ["NONE", "NONE"]
TAKEN = ["SUSPENDED", "SUSPENDED"]
LOOK = ["ACTIVE", "ACTIVE"]


def test_a_run_that_is_pre_empted_twice_is_run_again_until_it_is_finished(stubs):
    states = [*NEW, "PROVISIONING", *LOOK, *LOOK, *TAKEN] * 2 + [*NEW, *LOOK, *LOOK, "ACTIVE"]
    reports = ["idle,idle", "running,running"] * 2 + ["idle,idle", "exit 0,exit 0"]
    result, done = babysit(stubs, states, reports)
    assert result.status == 0, result.err
    assert done == ["create", "setup", "run", "delete"] * 2 + ["create", "setup", "run"]
    assert result.err.splitlines()[-1] == "finished"
    assert "run-a is still there, and paid for" in result.err


def test_node_words_for_a_taken_slice_count_too(stubs):
    states = ["PREEMPTED", "PREEMPTED", *NEW, *LOOK, "ACTIVE"]
    result, done = babysit(stubs, states, ["idle,idle", "exit 0,exit 0"])
    assert result.status == 0, result.err
    assert done == ["delete", "create", "setup", "run"]


@pytest.mark.parametrize("ended", ["exit 1", "exit 75", "exit 137", "exit 143", "lost", "idle"])
def test_a_restartable_end_is_run_again_on_the_same_slice(stubs, ended):
    reports = [
        "idle,idle",
        f"exit 0,{ended}",
        f"exit 0,{ended}",
        "running,running",
        "exit 0,exit 0",
    ]
    result, done = babysit(stubs, ["ACTIVE"], reports)
    assert result.status == 0, result.err
    assert done == ["setup", "run", "setup", "run"]


@pytest.mark.parametrize(
    "report", ["exit 2,exit 2", "exit 1,exit 2", "exit 2,exit 1", "exit 2,lost"]
)
def test_a_refused_input_is_not_run_again(stubs, report):
    result, done = babysit(stubs, ["ACTIVE"], ["idle,idle", "running,running", report])
    assert result.status == 2
    assert done == ["setup", "run", "logs"]
    assert result.err.splitlines()[-1].startswith("refused: the command ended with 2")


def test_what_an_earlier_command_left_is_no_answer_to_this_one(stubs):
    result, done = babysit(stubs, ["ACTIVE"], ["exit 2,exit 2", "exit 0,exit 0"])
    assert result.status == 0, result.err
    assert done == ["setup", "run"]


def test_a_run_that_is_on_its_way_is_taken_over(stubs):
    result, done = babysit(stubs, ["ACTIVE"], ["running,running", "exit 0,exit 0"])
    assert result.status == 0, result.err
    assert done == []


def test_failures_are_bounded(stubs):
    result, done = babysit(stubs, ["ACTIVE"], ["idle", "exit 1"], MAX_FAILURES="2")
    assert result.status == 1
    assert done == ["setup", "run"] * 3
    assert result.err.splitlines()[-1] == "stopped: the command ended with 1; 2 reruns did not help"


def test_slices_are_bounded(stubs):
    states = [*NEW, *TAKEN] * 9
    result, done = babysit(stubs, states, ["idle"], MAX_SLICES="3")
    assert result.status == 1
    assert done == ["create", "delete"] * 3
    assert result.err.splitlines()[-1].startswith("stopped: 3 slices were asked for")


def test_a_service_that_never_answers_is_given_up(stubs):
    result, done = babysit(stubs, ["FAIL"], ["idle"], MAX_UNREACHABLE="3")
    assert result.status == 1
    assert done == []
    assert (
        result.err.splitlines()[-1] == "stopped: the state of run-a is not known 4 times in a row"
    )


def test_quota_that_is_never_there_is_given_up(stubs):
    (stubs.folder / "no_create").touch()
    result, done = babysit(stubs, ["NONE"], ["idle"], MAX_UNREACHABLE="3")
    assert result.status == 1
    assert done == ["create"] * 4
    assert "run-a could not be created 4 times in a row" in result.err


def test_an_outage_between_two_looks_does_no_harm(stubs):
    # Four calls fail, never more than two in a row.
    states = [*LOOK, "FAIL", "FAIL", *LOOK, "FAIL", *LOOK, "ACTIVE"]
    reports = ["running,running", "running,running", "FAIL", "exit 0,exit 0"]
    result, done = babysit(stubs, states, reports, MAX_UNREACHABLE="2")
    assert result.status == 0, result.err
    assert done == []


def test_a_machine_that_was_set_up_by_nobody_is_set_up(stubs):
    result, done = babysit(stubs, ["ACTIVE"], ["FAIL", "exit 0,exit 0"])
    assert result.status == 0, result.err
    assert done == ["setup", "run"]


def test_workers_that_outlive_the_others_are_stopped(stubs):
    reports = ["idle,idle", *["exit 1,running"] * 3, "exit 1,exit 75", "exit 0,exit 0"]
    result, done = babysit(stubs, ["ACTIVE"], reports, MAX_STRAGGLES="2")
    assert result.status == 0, result.err
    assert done == ["setup", "run", "stop", "setup", "run"]


@pytest.mark.parametrize(("report", "status"), [("exit 0", 0), ("exit 2", 2)])
def test_the_slice_is_given_back_where_that_is_wished(stubs, report, status):
    result, done = babysit(stubs, ["ACTIVE"], ["running", report], WHEN_DONE="delete")
    assert result.status == status
    assert done[-1] == "delete"


def test_a_slice_of_somebody_else_is_left_alone(stubs):
    stubs.behave("printf 'run-a\\tSUSPENDED\\tsomebody\\n'")
    result = stubs.run("babysit.sh", *COMMAND, **VARIABLES)
    assert result.status == 2
    assert {call[4] for call in stubs.calls() if call[0] == "gcloud"} == {"list"}


def test_a_dry_run_prints_one_round(stubs):
    result = stubs.run("babysit.sh", "--dry-run", *COMMAND, WHEN_DONE="delete", **VARIABLES)
    expected = []
    for words in (["create"], ["wait"], ["setup"], ["run", *COMMAND], ["status"], ["delete"]):
        expected.append(stubs.run("tpu_vm.sh", "--dry-run", *words, **VARIABLES).out)
    assert result.status == 0, result.err
    assert result.out == "".join(expected)
    assert {call[0] for call in stubs.calls()} <= {"git"}


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "COMMAND: missing"),
        (["--dry-run"], {}, "COMMAND: missing"),
        (["--dryrun", "true"], {}, "'--dryrun': unknown word"),
        (["true"], {"MAX_FAILURES": "a few"}, "MAX_FAILURES: got 'a few'"),
        (["true"], {"WHEN_DONE": "destroy"}, "WHEN_DONE: got 'destroy'; allowed: keep or delete"),
        (["true"], {"NAME": ""}, "NAME: missing"),
        (["true"], {"SLICE": ""}, "SLICE: missing"),
        (["true"], {"CAPACITY": "cheap"}, "CAPACITY: got 'cheap'"),
        (["true"], {"LIBTPU_FLAGS": "faster"}, "GROUP: got 'faster'"),
    ],
)
def test_bad_input_is_one_line_before_any_call(stubs, words, variables, message):
    result = stubs.run("babysit.sh", *words, **(VARIABLES | variables))
    assert result.status == 2
    assert message in result.err
    assert result.err.count("error: ") == 1
    assert not [call for call in stubs.calls() if call[0] == "gcloud"]
