"""What every entry does at its door: help, full disks, files of somebody else in the way."""

import pathlib
import re
import subprocess
import sys

import pytest
from entry_process import ENTRIES, run_all

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / "sage_grpo_jax/assets/moving_shapes/transformer"
SMALL = f"--config={ROOT}/configs/moving_shapes.py"
PRETRAIN = f"--config={ROOT}/configs/moving_shapes_pretrain.py"


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """Entry -> what --help and --helpfull do."""
    commands = [[entry, flag] for entry in ENTRIES for flag in ("--help", "--helpfull")]
    found = run_all(commands, tmp_path_factory.mktemp("help"))
    return {entry: found[2 * i : 2 * i + 2] for i, entry in enumerate(ENTRIES)}


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_is_no_failure_and_keeps_its_lines(helps, entry):
    text = (ROOT / "sage_grpo_jax" / f"{entry}.py").read_text()
    defined = set(re.findall(r'DEFINE_\w+\(\s*"([\w.]+)"', text))
    assert defined
    for result in helps[entry]:
        assert result.status == 0, result
        assert result.stderr == ""
        # As somebody reads it in the file: a line of a command ends with one backslash.
        for line in text.split('"""')[1].replace("\\\\\n", "\\\n").strip().splitlines():
            assert line in result.stdout.splitlines(), line
        for name in defined:
            assert re.search(rf"--(\[no\])?{re.escape(name)}:", result.stdout), name


def test_a_recipe_that_exits_is_not_taken_for_help(tmp_path):
    (tmp_path / "recipe.py").write_text("import sys\nsys.exit(3)\n")
    (result,) = run_all([["schedule", f"--config={tmp_path}/recipe.py"]], tmp_path)
    assert result.status == 3


def test_a_full_disk_behind_the_output(tmp_path):
    """What is printed is the result of `schedule`; and standard error may be full as well."""
    command = [sys.executable, "-m", "sage_grpo_jax.schedule", SMALL]
    for error in (subprocess.PIPE, "/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command,
                stdout=full,
                stderr=full if error == "/dev/full" else error,
                text=True,
                check=False,
                cwd=ROOT,
            )
        assert done.returncode == 1
        if done.stderr is not None:
            assert re.fullmatch(r"stopped: .*No space left on device; .*\n", done.stderr)


# What a person has, and the command that would have put its results over it.
TAKEN = {
    "train over a model": (["train", SMALL, "--workdir=DIR"], "config.json"),
    "train over somebody's events": (
        ["train", SMALL, "--workdir=DIR"],
        "events.out.tfevents.1700000000.host",
    ),
    "train over metrics": (["train", SMALL, "--workdir=DIR"], "metrics.jsonl"),
    "train over checkpoints": (["train", SMALL, "--workdir=DIR"], "checkpoints/5/data"),
    "pretrain over a model": (["pretrain", PRETRAIN, "--workdir=DIR"], "config.json"),
    "pretrain over weights": (["pretrain", PRETRAIN, "--workdir=DIR"], "weights/vae/config.json"),
    "evaluate": (["evaluate", SMALL, "--out=DIR"], "metrics.json"),
    "sweep": (
        ["sweep", f"--config={ROOT}/configs/sweeps/eta_kl.py", "--workdir=DIR", "--index=0"],
        "sweep.json",
    ),
    "a clip": (
        ["sample", SMALL, "--prompts=PROMPTS", "--out=DIR"],
        "000_000001_seed0.mp4",
    ),
    "a contact sheet": (["sample", SMALL, "--prompts=PROMPTS", "--out=DIR"], "contact_sheet.png"),
    "convert": (
        ["convert", f"--src={MODEL}", "--src_format=diffusers", "--dst=DIR", "--overwrite",
         "--dst_format=diffusers"],
        "config.json",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """Name -> (result, folder, what was in it)."""
    root = tmp_path_factory.mktemp("taken")
    prompts = root / "prompts.txt"
    prompts.write_text("a large red disk moves left, fast, over a dark background\n")
    commands, folders = [], []
    for i, (command, name) in enumerate(TAKEN.values()):
        folder = root / f"{i}"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text('{"step": 1}\n')
        (folder / "notes.txt").write_text("mine")
        names = {"DIR": str(folder), "PROMPTS": str(prompts)}
        commands.append([re.sub("DIR|PROMPTS", lambda m, n=names: n[m[0]], c) for c in command])
        folders.append(folder)
    results = run_all(commands, root)
    return {name: row for name, *row in zip(TAKEN, results, folders, strict=True)}


@pytest.mark.parametrize("name", TAKEN)
def test_files_of_somebody_else_are_refused_by_name_and_stay(taken, name):
    result, folder = taken[name]
    file = TAKEN[name][1]
    assert result.status == 2, result
    assert result.stderr.startswith("error: ")
    assert result.stderr.splitlines()[-1].count(file) == 1
    assert "it is not replaced" in result.stderr
    assert len([x for x in result.stderr.splitlines() if not x.startswith("note:")]) == 1
    assert (folder / file).read_text() == '{"step": 1}\n'
    assert (folder / "notes.txt").read_text() == "mine"


def _report_of(tmp_path: pathlib.Path) -> list[str]:
    """The command for the report of a run that has finished."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text(
        '{"method": "sage", "seed": 0, "steps": 1, "eval": {"first": {}, "last": {}}, "time": {}}'
    )
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "reward/overall": 0.5}\n')
    return ["report", f"--runs={run}", f"--out={tmp_path / 'report'}"]


def test_a_report_is_written_again_until_somebody_writes_into_it(tmp_path):
    command, report = _report_of(tmp_path), tmp_path / "report"
    (report / "more").mkdir(parents=True)
    first, again = run_all([command, command], tmp_path)
    assert (first.status, again.status) == (0, 0), (first, again)
    text = (report / "report.md").read_text() + "\nMy remarks.\n"
    (report / "report.md").write_text(text)
    (third,) = run_all([command], tmp_path)
    assert third.status == 2
    assert re.match(r"error: --out: .* has report\.md already, .*changed since", third.stderr)
    assert (report / "report.md").read_text() == text


def test_a_disk_that_fills_while_results_are_written(tmp_path):
    """No file may grow over 4 KB: the message is one line, nothing half-written has a name."""
    commands = [
        _report_of(tmp_path),
        *(
            ["convert", f"--src={MODEL}", "--src_format=diffusers", f"--dst={tmp_path / form}",
             f"--dst_format={form}"]
            for form in ("diffusers", "orbax")
        ),
        ["sweep", TAKEN["sweep"][0][1], f"--workdir={tmp_path / 'sweep'}", "--index=0"],
        ["train", SMALL, f"--workdir={tmp_path / 'train'}"],
    ]  # fmt: skip
    for command, result in zip(commands, run_all(commands, tmp_path, 4096), strict=True):
        assert result.status == 1, (command, result)
        lines = [x for x in result.stderr.splitlines() if "% " not in x]  # progress
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("stopped: ")
        assert "File too large" in lines[0]
        assert result.stdout.count("done") == 0
    assert not (tmp_path / "diffusers").exists()
    assert not (tmp_path / "orbax").exists()
    names = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in names if "tmp" in name]
    assert {name for name in names if name.startswith(".")} <= {".lock"}
    assert not {"report.md", "reward_curve.png", "sweep.json"} & set(names)


def test_a_disk_that_is_too_small_is_no_mistake_of_the_command(tmp_path, monkeypatch, capsys):
    from sage_grpo_jax.common import folders
    from sage_grpo_jax.training import command_line

    monkeypatch.setattr(
        folders.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(SystemExit) as end:
        command_line.call(lambda: folders.check_space(tmp_path / "out", 2000, "dst"))
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(f"stopped: dst={tmp_path / 'out'}: 0.00 GB to write")
