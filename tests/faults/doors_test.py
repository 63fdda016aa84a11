"""What every entry does at its door: help, full disks, files of somebody else in the way."""

import pathlib
import re
import subprocess
import sys

import pytest
from entry_modules import import_entry
from entry_process import ENTRIES, FULL, Result, run_all

from sage_grpo_jax.common import command_line, folders
from sage_grpo_jax.experiments import run_report

report = import_entry("report")

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / "sage_grpo_jax/assets/moving_shapes/transformer"
SMALL = f"--config={ROOT}/configs/moving_shapes.py"
PRETRAIN = f"--config={ROOT}/configs/moving_shapes_pretrain.py"
SWEEP = ["sweep", f"--config={ROOT}/configs/sweeps/eta_kl.py", "--index=0", "--workdir=DIR"]
SAMPLE = ["sample", SMALL, "--prompts=PROMPTS", "--out=DIR"]
TRAIN = ["train", SMALL, "--workdir=DIR"]
CONVERT = ["convert", f"--src={MODEL}", "--src_format=diffusers", "--dst=DIR"]

# What a person has, and the command that would have put its results over it.
TAKEN = {
    "train over a model": (TRAIN, "config.json"),
    "train over somebody's events": (TRAIN, "events.out.tfevents.1700000000.host"),
    "train over metrics": (TRAIN, "metrics.jsonl"),
    "train over checkpoints": (TRAIN, "checkpoints/5/data"),
    "pretrain over a model": (["pretrain", PRETRAIN, "--workdir=DIR"], "config.json"),
    "pretrain over weights": (["pretrain", PRETRAIN, "--workdir=DIR"], "weights/vae/config.json"),
    "evaluate": (["evaluate", SMALL, "--out=DIR"], "metrics.json"),
    "sweep": (SWEEP, "sweep.json"),
    "a clip": (SAMPLE, "000_000001_seed0.mp4"),
    "a contact sheet": (SAMPLE, "contact_sheet.png"),
    "convert": ([*CONVERT, "--overwrite", "--dst_format=diffusers"], "config.json"),
}
# Commands that write at once, and what may not be there afterwards.
FILLING = {
    "diffusers": ([*CONVERT, "--dst_format=diffusers"], ""),
    "orbax": ([*CONVERT, "--dst_format=orbax"], ""),
    "sweep": (SWEEP, "sweep.json"),
    "train": (TRAIN, "checkpoints"),
    "report": (["report", "--runs=RUN", "--out=DIR"], "report.md"),
}
# Prompts that the small world has no words for; what reads the caption takes whole ones only.
UNSAYABLE = {
    "sample": (["sample", SMALL, "--prompts=BAD", "--out=DIR"], "--prompts"),
    "train": ([*TRAIN, "--config.data.train_prompts=BAD"], "config.data.train_prompts"),
    "evaluate": (
        ["evaluate", SMALL, "--out=DIR", "--config.data.eval_prompts=BAD"],
        "config.data.eval_prompts",
    ),
    "train on a part": (
        [*TRAIN, "--config.data.train_prompts=PART"],
        "config.data.train_prompts",
    ),
}
HELP = ("--help", "--helpfull")


class Results:
    """What became of all commands of this file, run by one process that has imported them."""

    def __init__(self, root: pathlib.Path) -> None:
        self._root, self._commands = root, {}
        self._names = {"DIR": root, "PROMPTS": root / "prompts.txt", "RUN": root / "run"}
        caption = "a large red disk moves left, fast, over a dark background\n"
        (root / "prompts.txt").write_text(caption)
        self._names |= {"BAD": root / "bad.txt", "PART": root / "part.txt"}
        (root / "bad.txt").write_text(f"{caption}{caption.replace('red disk', 'orange cat')}")
        (root / "part.txt").write_text(f"{caption}a red disk\n")
        (root / "recipe.py").write_text("import sys\nsys.exit(3)\n")
        _write_run(root / "run")
        for entry in ENTRIES:
            for flag in HELP:
                self._commands[entry, flag] = [entry, flag]
        self._commands["exits"] = ["schedule", f"--config={root}/recipe.py"]
        for name, (command, file) in TAKEN.items():
            folder = self.folder(name)
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text('{"step": 1}\n')
            (folder / "notes.txt").write_text("mine")
            self._commands[name] = self._filled_in(folder, command)
        for name, (command, _) in FILLING.items():
            command = self._filled_in(self.folder(f"full {name}"), command)
            self._commands["full", name] = [FULL, *command]
        for name, (command, _) in UNSAYABLE.items():
            folder = self.folder(f"unsayable {name}")
            self._commands["unsayable", name] = self._filled_in(folder, command)
        found = run_all(list(self._commands.values()), root)
        self._found = dict(zip(self._commands, found, strict=True))

    def folder(self, name: str) -> pathlib.Path:
        """Where a command writes."""
        return self._root / re.sub(r"\W", "_", name)

    def _filled_in(self, folder: pathlib.Path, command: list[str]) -> list[str]:
        names = {**self._names, "DIR": folder}
        return [
            re.sub("=(DIR|PROMPTS|RUN|BAD|PART)$", lambda found: f"={names[found[1]]}", flag)
            for flag in command
        ]

    def __getitem__(self, name) -> Result:
        return self._found[name]


def _write_run(folder: pathlib.Path) -> None:
    """What `report` reads of a run that has finished."""
    folder.mkdir()
    (folder / "summary.json").write_text(
        '{"method": "sage", "seed": 0, "steps": 1, "eval": {"first": {}, "last": {}}, "time": {}}'
    )
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "reward/overall": 0.5}\n')


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return Results(tmp_path_factory.mktemp("doors"))


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_is_no_failure_and_keeps_its_lines(results, entry):
    text = (ROOT / "sage_grpo_jax" / f"{entry}.py").read_text()
    defined = set(re.findall(r'DEFINE_\w+\(\s*"([\w.]+)"', text))
    assert defined
    for flag in HELP:
        result = results[entry, flag]
        assert result.status == 0, result
        assert result.stderr == ""
        # As somebody reads it in the file: a line of a command ends with one backslash.
        for line in text.split('"""')[1].replace("\\\\\n", "\\\n").strip().splitlines():
            assert line in result.stdout.splitlines(), line
        for name in defined:
            assert re.search(rf"--(\[no\])?{re.escape(name)}:", result.stdout), name


def test_a_recipe_that_exits_is_not_taken_for_help(results):
    assert results["exits"].status == 3


@pytest.mark.parametrize("name", TAKEN)
def test_files_of_somebody_else_are_refused_by_name_and_stay(results, name):
    result, folder, file = results[name], results.folder(name), TAKEN[name][1]
    assert result.status == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert file in result.stderr
    assert "it is not replaced" in result.stderr
    assert (folder / file).read_text() == '{"step": 1}\n'
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FILLING)
def test_a_disk_that_fills_while_results_are_written(results, name):
    result, folder = results["full", name], results.folder(f"full {name}")
    assert result.status == 1, result
    lines = [x for x in result.stderr.splitlines() if "% " not in x]  # progress
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("stopped: ")
    assert "File too large" in lines[0]
    assert "done" not in result.stdout
    assert not (folder / FILLING[name][1]).exists()
    left = [path.name for path in (*folder.rglob("*"), *folder.parent.glob(f".{folder.name}*"))]
    assert {x for x in left if x.startswith(".") or "tmp" in x} <= {".lock"}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_captions_that_the_small_world_cannot_say_are_named(results, name):
    result, field = results["unsayable", name], UNSAYABLE[name][1]
    assert result.status == 2, result
    assert result.stderr.count("\n") == 1
    assert re.match(rf"error: {re.escape(field)}: \S+\.txt: prompt '000002' \('a ", result.stderr)
    wanted = "the small world has no word 'orange', 'cat'; allowed: a, moves, over, background, "
    if name == "train on a part":
        wanted = "not a whole caption; allowed: as in 'a large red disk moves left, fast, "
    assert wanted in result.stderr
    prompts = "train_prompts-*" if name.startswith("train") else "eval_prompts-*"
    assert not list(results.folder(f"unsayable {name}").glob(f"embeddings/{prompts}"))


def test_a_full_disk_behind_the_output():
    """What is printed is the result of `schedule`; and standard error may be full as well."""
    command = [sys.executable, "-m", "sage_grpo_jax.schedule", SMALL]
    with open("/dev/full", "w") as full:
        half, whole, good = (
            subprocess.run(command, stdout=out, stderr=error, text=True, check=False, cwd=ROOT)
            for out, error in ((full, subprocess.PIPE), (full, full), (subprocess.PIPE, full))
        )
    assert (half.returncode, whole.returncode, good.returncode) == (1, 1, 0)
    assert "precise" in good.stdout
    assert re.fullmatch(r"stopped: .*No space left on device; .*\n", half.stderr)


def test_a_report_is_written_again_until_somebody_writes_into_it(tmp_path):
    _write_run(tmp_path / "run")
    run, out = run_report.read_run(tmp_path / "run"), tmp_path / "report"
    (out / "more").mkdir(parents=True)
    report._report_runs([run], out)
    first = (out / "report.md").read_bytes()
    report._report_runs([run], out)
    assert (out / "report.md").read_bytes() == first
    (out / "report.md").write_bytes(first + b"\nMy remarks.\n")
    with pytest.raises(ValueError, match=r"--out: .* has report\.md already, .*changed since"):
        report._report_runs([run], out)
    assert (out / "report.md").read_bytes() == first + b"\nMy remarks.\n"


def test_a_disk_that_is_too_small_is_no_mistake_of_the_command(tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit) as end:
        command_line.call(lambda: folders.check_space(tmp_path / "out", 2000, "dst"))
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(f"stopped: dst={tmp_path / 'out'}: 0.00 GB to write")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(28, "No space left on device", "/a/file"), 1),
        (ValueError("OUT_OF_RANGE: Error writing: No space left on device [28]"), 1),
        (RuntimeError("array_record: Disk quota exceeded"), 1),
        (BrokenPipeError(32, "Broken pipe"), 1),
        (OSError(2, "No such file or directory", "/a/file"), 2),
        (ValueError("a wrong\nvalue"), 2),
    ],
)
def test_failures_of_the_world_are_told_from_bad_input(capsys, error, status):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        command_line.call(fail)
    assert end.value.code == status
    said = capsys.readouterr().err
    assert said.startswith("stopped: " if status == 1 else "error: ")
    assert said.count("\n") == 1


def test_mistakes_of_the_program_keep_their_trace():
    with pytest.raises(KeyError):
        command_line.call(lambda: {}["x"])
