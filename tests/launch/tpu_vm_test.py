"""launch/tpu_vm.sh: what it prints, what it calls, what it refuses."""

import pathlib
import subprocess

import pytest
from launch_stubs import CLOUD, FLAGS, HOSTILE, LAUNCH, LIST, PLACE, QUEUED, ROOT, Stubs

SLICE = PLACE | {"SLICE": "v6e:4x4"}
COMMAND = ["python", "-m", "sage_grpo_jax.train", "--config=c.py:lora=64", "--workdir=/mnt/a"]


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> Stubs:
    return Stubs(tmp_path)


def ssh(command: str, node: str = "all", worker: str = "all", via: tuple[str, ...] = ()):
    flags = [f"--node={node}", f"--worker={worker}", *via, f"--command={command}"]
    return [*QUEUED, "ssh", "run-a", *FLAGS, *flags]


def as_words(stubs: Stubs, text: str) -> list[list[str]]:
    """The calls that a dry run printed, by running what it printed."""
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for program in ("git", "rm"):
        stubs.add(program)
    assert stubs.run("bash", "-ec", text).status == 0
    return stubs.calls()


def made(*flags: str, accelerator: str = "v6e-16", runtime: str = "v2-alpha-tpuv6e"):
    described = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"]
    label = "--labels=created_by=sage_grpo_jax"
    return [*QUEUED, "create", "run-a", *FLAGS, *described, label, *flags]


HOST = "bash sage_grpo_jax/launch/run_host.sh"
INSTALL = (
    "mkdir -p sage_grpo_jax && tar -xzf sage_grpo_jax.tar.gz -C sage_grpo_jax"
    " && bash sage_grpo_jax/launch/setup_host.sh"
)


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (["create"], {}, [LIST, made("--node-id=run-a", "--spot")]),
        (["create"], {"CAPACITY": "reserved"}, [LIST, made("--node-id=run-a", "--reserved")]),
        (["create"], {"CAPACITY": "on_demand"}, [LIST, made("--node-id=run-a")]),
        (
            ["create"],
            {"SLICES": "2", "SLICE": "v5p:2x2x4", "CAPACITY": "on_demand"},
            # Two TensorCores a chip count in the name: 16 chips are v5p-32.
            [
                LIST,
                made(
                    "--node-count=2",
                    "--node-prefix=run-a",
                    accelerator="v5p-32",
                    runtime="v2-alpha-tpuv5",
                ),
            ],
        ),
        (
            ["create"],
            {"SLICE": "v5e:2x4", "SSH_VIA": "iap", "NETWORK": "n", "SUBNETWORK": "s"}
            | {"SERVICE_ACCOUNT": "a@b.c"},
            [
                LIST,
                made(
                    "--node-id=run-a",
                    "--spot",
                    "--internal-ips",
                    "--network=n",
                    "--subnetwork=s",
                    "--service-account=a@b.c",
                    accelerator="v5litepod-8",
                    runtime="v2-alpha-tpuv5-lite",
                ),
            ],
        ),
        (
            ["create"],
            {"RUNTIME": "my image"},
            [LIST, made("--node-id=run-a", "--spot", runtime="my image")],
        ),
        (["wait"], {}, [LIST]),
        (["run", *COMMAND], {}, [ssh(f"{HOST} start {' '.join(COMMAND)}")]),
        (["run", "--", *COMMAND], {}, [ssh(f"{HOST} start {' '.join(COMMAND)}")]),
        (
            ["run", "true"],
            {"LIBTPU_FLAGS": "vmem all_to_all", "SSH_VIA": "internal"},
            [
                ssh(
                    f"{HOST} start env 'LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304"
                    " --xla_tpu_enable_async_all_to_all=true' true",
                    via=("--internal-ip",),
                )
            ],
        ),
        (["status"], {}, [LIST, ssh(f"{HOST} status")]),
        (["logs"], {}, [ssh(f"{HOST} logs 100", node="0", worker="0")]),
        (
            ["logs"],
            {"LINES": "5", "WORKER": "all", "FOLLOW": "yes"},
            [ssh(f"{HOST} logs 5 follow")],
        ),
        (["stop"], {"SSH_VIA": "iap"}, [ssh(f"{HOST} stop", via=("--tunnel-through-iap",))]),
        (["delete"], {}, [LIST, [*QUEUED, "delete", "run-a", *FLAGS, "--force", "--quiet"]]),
        (["state"], {}, [LIST]),
    ],
)
def test_a_dry_run_prints_all_commands_and_calls_nothing(stubs, words, variables, expected):
    result = stubs.run("tpu_vm.sh", "--dry-run", *words, **(SLICE | variables))
    assert result.status == 0, result.err
    assert stubs.calls() == []
    assert as_words(stubs, result.out) == expected


def test_setup_copies_the_committed_state_and_installs_it(stubs):
    result = stubs.run("tpu_vm.sh", "--dry-run", "setup", SETUP_COMMAND="echo 'a;b'", **PLACE)
    archive = f"{stubs.home}/sage_grpo_jax-run-a.tar.gz"
    everywhere = ["--node=all", "--worker=all"]
    last = f"{INSTALL} && bash -c 'echo '\\''a;b'\\'''"
    assert result.status == 0, result.err
    assert as_words(stubs, result.out) == [
        ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        [*QUEUED, "scp", archive, "run-a:sage_grpo_jax.tar.gz", *FLAGS, *everywhere],
        ["rm", archive],
        ssh(last),
    ]


@pytest.mark.parametrize("word", HOSTILE)
def test_a_word_of_the_command_comes_through_two_shells(stubs, word):
    stubs.behave('for last; do :; done; cd "$here" && exec bash -c "${last#--command=}"')
    (stubs.folder / "sage_grpo_jax/launch").mkdir(parents=True)
    echo = stubs.folder / "sage_grpo_jax/launch/run_host.sh"
    echo.write_text("printf '<%s>' \"$@\" >received\n")

    printed = stubs.run("tpu_vm.sh", "--dry-run", "run", "python", word, "end", **SLICE)
    assert stubs.run("bash", "-c", printed.out).status == 0
    from_dry_run = (stubs.folder / "received").read_text()
    dry_calls = stubs.calls()

    assert from_dry_run == f"<start><python><{word}><end>"
    assert not list(stubs.folder.rglob("INJECTED"))
    # What is printed is what would be run, word for word.
    stubs.behave("")
    assert stubs.run("tpu_vm.sh", "run", "python", word, "end", **SLICE).status == 0
    assert stubs.calls() == dry_calls


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "WORD: missing"),
        (["crate"], {}, "'crate': unknown word; allowed: create, wait, setup"),
        (["--dryrun", "create"], {}, "'--dryrun': unknown word"),
        (["create", "now"], {}, "'now': unexpected word after create"),
        (["create", "--dry-run"], {}, "'--dry-run': unexpected word"),
        (["create"], {"PROJECT": ""}, "PROJECT: missing"),
        (["create"], {"ZONE": ""}, "ZONE: missing"),
        (["create"], {"ZONE": "us-east5"}, "ZONE: got 'us-east5'"),
        (["delete"], {"NAME": ""}, "NAME: missing"),
        (["delete"], {"NAME": "a b"}, "NAME: got 'a b'"),
        (["delete"], {"NAME": "-a"}, "NAME: got '-a'"),
        (["delete"], {"NAME": "a;b"}, "NAME: got 'a;b'"),
        (["delete"], {"NAME": "a" * 62}, "NAME: got"),
        (["create"], {"SLICE": ""}, "SLICE: missing"),
        (["create"], {"SLICE": "v6e-16"}, "SLICE: got 'v6e-16'"),
        (["create"], {"SLICE": "v6e:4x0"}, "SLICE: got"),
        (["create"], {"SLICE": "v6e:4x4x4"}, "2 dimensions for a v6e"),
        (["create"], {"SLICE": "v5p:4x4"}, "3 dimensions for a v5p"),
        (["create"], {"SLICE": "tpu7x:2x2x1"}, "tpu7x is on GKE only"),
        (["create"], {"SLICE": "v6e:$(touch INJECTED)"}, "SLICE: got"),
        (["create"], {"CAPACITY": "cheap"}, "CAPACITY: got 'cheap'; allowed: spot"),
        (["create"], {"SLICES": "0"}, "SLICES: got '0'"),
        (["create"], {"SSH_VIA": "pigeon"}, "SSH_VIA: got 'pigeon'"),
        (["run"], {}, "COMMAND: missing"),
        (["run", "--"], {}, "COMMAND: missing"),
        (["run", "true"], {"LIBTPU_FLAGS": "faster"}, "GROUP: got 'faster'"),
        (["logs"], {"LINES": "many"}, "LINES: got 'many'"),
        (["logs"], {"WORKER": "first"}, "WORKER: got 'first'"),
        (["logs"], {"FOLLOW": "maybe"}, "FOLLOW: got 'maybe'"),
    ],
)
def test_bad_input_is_one_line_before_any_call(stubs, words, variables, message):
    result = stubs.run("tpu_vm.sh", *words, **(SLICE | variables))
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert stubs.calls() == []
    assert not (stubs.home / "INJECTED").exists()


def test_without_gcloud_it_says_so(tmp_path):
    stubs = Stubs(tmp_path, tuple(name for name in CLOUD if name != "gcloud"))
    result = stubs.run("tpu_vm.sh", "status", **SLICE)
    assert result.status == 2
    assert result.err.startswith("error: gcloud: not found on PATH")


# A cloud with one zone: state and owner lie in a file; its one worker is a folder of this machine.
CLOUD_OF_ONE = r"""
slice=$here/slice worker=$here/worker
for last; do :; done
case "$4" in
  list) [ ! -e "$slice" ] || cat "$slice" ;;
  create) printf 'run-a\tACTIVE\tsage_grpo_jax\n' >"$slice"; mkdir "$worker" ;;
  delete) rm -r "$slice" "$worker" ;;
  scp) cp "$5" "$worker/${6#*:}" ;;
  ssh) cd "$worker" && HOME=$worker VENV=$here/venv exec bash -c "${last#--command=}" ;;
esac
"""


def test_create_setup_run_logs_and_delete(tmp_path):
    """The scripts of the worker run too, in its home, but for the installation by pip."""
    stubs = Stubs(tmp_path, (*CLOUD, "git"))
    behaviour = (
        CLOUD_OF_ONE
        + f"""
    if [ "${{0##*/}}" = git ]; then
      case "$3" in
        archive) tar -czf "${{5#--output=}}" -C {ROOT} launch requirements.txt setup.py ;;
      esac
    fi
    """
    )
    stubs.behave(behaviour)
    (stubs.folder / "venv/bin").mkdir(parents=True)
    pip = stubs.folder / "venv/bin/python"
    pip.write_text(f"#!/bin/bash\nprintf '%s ' \"$@\" >>{stubs.folder}/pip\n")
    pip.chmod(0o755)

    for word in ("create", "create", "wait", "setup"):
        result = stubs.run("tpu_vm.sh", word, **SLICE)
        assert result.status == 0, result.err
    assert [call[4] for call in stubs.calls() if call[4] in ("create", "delete")] == ["create"]
    jax = (ROOT / "requirements.txt").read_text().partition("\njax==")[2].partition("\n")[0]
    assert f"-r requirements.txt jax[tpu]=={jax} " in (stubs.folder / "pip").read_text()

    script = 'echo "hello from $1"; exit 3'
    result = stubs.run("tpu_vm.sh", "run", "bash", "-c", script, "-", "a  'worker'", **SLICE)
    assert result.status == 0, result.err
    run_dir = stubs.folder / "worker/sage_grpo_jax_run"
    stubs.run("flock", str(run_dir / "lock"), "true")  # until it has ended
    assert stubs.run("tpu_vm.sh", "logs", **SLICE).out == "hello from a  'worker'\n"
    assert stubs.run("tpu_vm.sh", "status", **SLICE).out.splitlines()[0] == "slice run-a: ACTIVE"
    assert stubs.run("tpu_vm.sh", "status", **SLICE).out.endswith(": exit 3\n")

    assert stubs.run("tpu_vm.sh", "delete", **SLICE).status == 0
    assert stubs.run("tpu_vm.sh", "state", **SLICE).out == "NONE\n"
    assert stubs.run("tpu_vm.sh", "delete", **SLICE).err == "run-a: nothing to delete\n"


@pytest.mark.parametrize("row", ["run-a\tACTIVE\t", "run-a\tSUSPENDED\tsomebody"])
@pytest.mark.parametrize("word", ["create", "delete", "state"])
def test_a_slice_of_somebody_else_stays(stubs, word, row):
    stubs.behave(f"printf '%s\\n' '{row}'")
    result = stubs.run("tpu_vm.sh", word, **SLICE)
    assert result.status == 2
    assert "was not made by this script" in result.err
    assert stubs.calls() == [LIST]


def test_names_that_only_begin_alike_are_others(stubs):
    stubs.behave(r"printf 'run-ab\tACTIVE\tsomebody\nx-run-a\tACTIVE\tsomebody\n'")
    assert stubs.run("tpu_vm.sh", "state", **SLICE).out == "NONE\n"


@pytest.mark.parametrize("word", ["create", "delete", "state", "wait", "status"])
def test_a_list_that_fails_is_no_absence(stubs, word):
    stubs.behave("echo no network >&2; exit 1")
    result = stubs.run("tpu_vm.sh", word, **SLICE)
    assert result.status == 1
    assert result.err.splitlines()[-1].startswith("stopped: the queued resources of my-project")
    assert stubs.calls() == [LIST]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_says_what_to_do_with_a_dead_slice(stubs, state):
    stubs.behave(rf"printf 'run-a\t{state}\tsage_grpo_jax\n'")
    result = stubs.run("tpu_vm.sh", "create", **SLICE)
    assert result.status == 1
    assert f"run-a is {state}: bash launch/tpu_vm.sh delete, then create" in result.err
    assert stubs.calls() == [LIST]


def test_wait_looks_until_the_slice_is_active(stubs):
    rows = [f"run-a\t{state}\tsage_grpo_jax" for state in ("WAITING_FOR_RESOURCES", "PROVISIONING")]
    stubs.queue("rows", *rows, "run-a\tACTIVE\tsage_grpo_jax")
    stubs.behave("pop rows")
    result = stubs.run("tpu_vm.sh", "wait", POLL_SECONDS="0", **SLICE)
    assert result.status == 0
    assert result.err == "run-a is WAITING_FOR_RESOURCES; waiting\n"
    assert stubs.calls() == [LIST] * 3


@pytest.mark.parametrize(
    ("row", "calls", "message"),
    [
        ("run-a\tSUSPENDED\tsage_grpo_jax", 1, "stopped: run-a is SUSPENDED"),
        ("", 1, "stopped: run-a is NONE"),
        ("run-a\tPROVISIONING\tsage_grpo_jax", 4, "stopped: run-a is still PROVISIONING"),
    ],
)
def test_wait_ends(stubs, row, calls, message):
    stubs.queue("rows", row)
    stubs.behave("pop rows")
    result = stubs.run("tpu_vm.sh", "wait", POLL_SECONDS="0", MAX_POLLS="4", **SLICE)
    assert result.status == 1
    assert result.err.splitlines()[-1] == message
    assert stubs.calls() == [LIST] * calls


def test_what_is_not_committed_does_not_travel(tmp_path):
    """With git itself, in a repository that holds the scripts."""
    stubs = Stubs(tmp_path)
    stubs.behave(r'[ "$4" != scp ] || cp "$5" "$here/sent.tar.gz"')
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    for name in ("common.sh", "tpu_vm.sh"):
        (repository / "launch" / name).write_bytes((LAUNCH / name).read_bytes())
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    script = str(repository / "launch/tpu_vm.sh")

    subprocess.run([*git, "init", "-q"], check=True)
    result = stubs.run("bash", script, "setup", **PLACE)
    assert result.status == 2
    assert "not a git repository with a commit" in result.err
    assert stubs.calls() == []

    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "."], check=True)
    (repository / "later.py").touch()
    result = stubs.run("bash", script, "setup", **PLACE)
    assert result.status == 0, result.err
    assert "changes that are not committed do not travel" in result.err
    sent = stubs.run("tar", "-tzf", str(stubs.folder / "sent.tar.gz")).out.split()
    assert sent == ["launch/", "launch/common.sh", "launch/tpu_vm.sh"]
    assert not list(stubs.home.glob("*.tar.gz"))
