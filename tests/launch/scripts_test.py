"""What all scripts of launch/ have in common, and the manifests beside them."""

import math
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from launch_stubs import LAUNCH, ROOT, Stubs

SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Sourced by others, and those of the developers.
NOT_RUN_ELSEWHERE = {"common", "setup_env", "gen_proto", "mutants", "quickstart", "test"}
STARTERS = [path for path in SCRIPTS if path.stem not in NOT_RUN_ELSEWHERE]


def test_shellcheck_finds_nothing():
    beside = f"{sys.prefix}/bin"
    program = shutil.which("shellcheck", path=beside) or shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install -r requirements-dev.txt"
    files = [*map(str, SCRIPTS), str(ROOT / ".ci/run")]
    done = subprocess.run([program, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_would_find_something(tmp_path):
    """The rules of this repository do not switch it off."""
    program = shutil.which("shellcheck", path=f"{sys.prefix}/bin") or shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install -r requirements-dev.txt"
    bad = "#!/usr/bin/env bash\nset -euo pipefail\nrm $1\n"
    done = subprocess.run([program, "-"], input=bad, cwd=ROOT, capture_output=True, text=True)
    assert "SC2086" in done.stdout


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.stem)
def test_help_names_every_variable(path, tmp_path):
    stubs = Stubs(tmp_path)
    text = path.read_text()
    assert "\nset -euo pipefail\n" in text
    shown = stubs.run(path.name, "--help")
    assert shown.status == 0
    assert "--dry-run" in shown.out
    assert shown.err == ""
    used = set(re.findall(r"require_variable ([A-Z_]+)", text))
    used |= set(re.findall(r"\$\{([A-Z_]+):-", text)) - {"TMPDIR", "LOCK_SECONDS", "DRY_RUN"}
    help_text = shown.out + (LAUNCH / "tpu_vm.sh").read_text() * (path.stem == "babysit")
    assert not {name for name in used if not re.search(rf"\b{name}\b", help_text)}
    assert stubs.calls() == []


def test_an_old_bash_is_refused(tmp_path):
    """macOS has 3.2, which quotes in another way."""
    text = (LAUNCH / "common.sh").read_text().replace("BASH_VERSINFO", "VERSION_HERE")
    (tmp_path / "common.sh").write_text(text)
    stubs = Stubs(tmp_path)
    for version, status in (("3 2", 2), ("4 3", 2), ("4 4", 0), ("5 0", 0)):
        script = f"VERSION_HERE=({version}); . {tmp_path}/common.sh"
        assert stubs.run("bash", "-c", script).status == status


# The manifest for kubectl.
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
(SLICE,) = JOBSET["spec"]["replicatedJobs"]
JOB = SLICE["template"]["spec"]
POD = JOB["template"]["spec"]
(TRAINER,) = POD["containers"]


def test_workers_are_one_indexed_pod_a_machine_that_start_and_fail_together():
    topology = POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    chips = TRAINER["resources"]["limits"]["google.com/tpu"]
    assert JOB["completions"] == JOB["parallelism"] == rows * columns // chips
    assert TRAINER["resources"]["requests"] == TRAINER["resources"]["limits"]
    assert JOB["completionMode"] == "Indexed"
    assert JOB["backoffLimit"] == 0
    assert POD["restartPolicy"] == "Never"
    assert POD["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    exclusive = JOBSET["metadata"]["annotations"]
    assert (
        exclusive["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"
    )
    assert JOBSET["spec"]["network"] == {
        "enableDNSHostnames": True,
        "publishNotReadyAddresses": True,
    }


def test_exit_status_2_fails_the_set_and_all_others_restart_it():
    (rule,) = JOB["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "trainer", "operator": "In", "values": [2]}
    assert TRAINER["name"] == "trainer"
    policy = JOBSET["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 10
    (refused,) = policy["rules"]
    assert refused["action"] == "FailJobSet"
    assert refused["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_the_manifest_gives_a_save_the_time_that_xpk_gives():
    default = re.search(r"GRACE_SECONDS:-(\d+)", (LAUNCH / "xpk.sh").read_text())[1]
    assert POD["terminationGracePeriodSeconds"] == int(default)


def test_the_image_starts_what_hands_signals_on():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    (entry,) = (line for line in lines if line.startswith("ENTRYPOINT"))
    assert entry == 'ENTRYPOINT ["bash", "/app/launch/run_host.sh", "foreground"]'
    copied = {line.split()[-1].removeprefix("./") for line in lines if line.startswith("COPY")}
    allowed = (ROOT / ".dockerignore").read_text()
    assert all((ROOT / name).exists() and f"!{name}\n" in allowed for name in copied if name)
    assert "command" not in TRAINER  # which would replace the entry point


def test_the_manifest_mounts_what_the_workdir_lies_on():
    (mount,) = TRAINER["volumeMounts"]
    (workdir,) = (word for word in TRAINER["args"] if word.startswith("--workdir="))
    assert workdir.removeprefix("--workdir=").startswith(mount["mountPath"] + "/")
    assert [volume["name"] for volume in POD["volumes"]] == [mount["name"]]


def test_the_readme_names_slices_as_the_scripts_do(tmp_path):
    stubs = Stubs(tmp_path)
    place = {"PROJECT": "p", "ZONE": "us-east5-b", "NAME": "a", "CLUSTER": "c", "IMAGE": "i"}
    rows = re.findall(r"^\| `(\w+:[\dx]+)` \|(.*)\|$", (LAUNCH / "README.md").read_text(), re.M)
    assert len(rows) == 5
    for name, rest in rows:
        queued, gke, chips, _ = (column.strip() for column in rest.split("|"))
        sides = [int(side) for side in name.partition(":")[2].split("x")]
        assert int(chips) == math.prod(sides)
        assert gke.endswith(f"`{name.partition(':')[2]}`")
        created = stubs.run("tpu_vm.sh", "--dry-run", "create", SLICE=name, **place)
        if name.startswith("tpu7x"):
            assert created.status == 2
        else:
            assert f"--accelerator-type={queued.split('`')[1]} " in created.out
        submitted = stubs.run("xpk.sh", "--dry-run", "submit", "true", SLICE=name, **place)
        chip = name.partition(":")[0].replace("v5e", "v5litepod")
        assert f"--tpu-type={chip}-{name.partition(':')[2]} " in submitted.out


def test_the_commands_of_the_readme_are_those_of_the_scripts(tmp_path):
    """Every `bash launch/NAME.sh WORD` of the page passes the script's own check of words."""
    stubs = Stubs(tmp_path)
    text = (LAUNCH / "README.md").read_text()
    words = set(re.findall(r"bash launch/(\w+\.sh) (?:--dry-run )?([a-z]+)\b", text))
    assert len(words) >= 10
    for script, word in words:
        command = ["true"] if word in ("run", "submit") else []
        variables = {"PROJECT": "p", "ZONE": "us-east5-b", "NAME": "a", "SLICE": "v6e:4x4"}
        variables |= {"CLUSTER": "c", "IMAGE": "i"}
        result = stubs.run(script, "--dry-run", word, *command, **variables)
        assert result.status == 0, (script, word, result.err)
