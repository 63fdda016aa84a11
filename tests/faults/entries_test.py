"""Every entry: a mistake is one line on stderr and exit status 2, and nothing is made of it."""

import pathlib
import re

import pytest
from entry_process import ENTRIES, run_all

ROOT = pathlib.Path(__file__).parents[2]
SMALL = f"--config={ROOT}/configs/moving_shapes.py"
RECIPES = {
    "evaluate": SMALL,
    "pretrain": f"--config={ROOT}/configs/moving_shapes_pretrain.py",
    "sample": SMALL,
    "schedule": SMALL,
    "sweep": f"--config={ROOT}/configs/sweeps/eta_kl.py",
    "train": SMALL,
}
# What the entries need besides a recipe; commands run in an empty folder.
NEEDED = {
    "convert": ["--src=a", "--src_format=orbax", "--dst=new", "--dst_format=peft"],
    "encode_prompts": ["--prompts=a.txt", "--text_encoder=b", "--out=new"],
    "evaluate": ["--out=new"],
    "pretrain": ["--workdir=new"],
    "report": ["--runs=a", "--out=new"],
    "sample": ["--prompts=moving_shapes:held_out", "--out=new"],
    "schedule": [],
    "serve_rewards": ["--backend=moving_shapes", "--port=0"],
    "sweep": ["--workdir=new"],
    "train": ["--workdir=new"],
}
FILE = "FILE"  # stands for the path of a file


def _of_flags() -> dict[str, tuple[list[str], str]]:
    """Cases that hold for every entry: name -> (command, what the line is to match)."""
    cases = {}
    for entry in ENTRIES:
        recipe, needed = [RECIPES[entry]] if entry in RECIPES else [], NEEDED[entry]
        good = [entry, *recipe, *needed]
        cases[f"{entry}, argument"] = ([*good, "extra"], "unexpected arguments: extra; allowed: ")
        cases[f"{entry}, flag"] = ([*good, "--nonsense=1"], "Unknown command line flag 'nonsense'")
        names = [flag.partition("=")[0] for flag in needed if not flag.startswith("--port")]
        if names:
            missing = ", ".join(names)
            cases[f"{entry}, missing"] = ([entry, *recipe], f"{missing}: missing")
        for name in names:
            emptied = [f"{name}=" if flag.startswith(f"{name}=") else flag for flag in needed]
            cases[f"{entry}, {name}="] = ([entry, *recipe, *emptied], f"{name}: empty; allowed: ")
        if recipe:
            for case, flags, text in (
                ("no config", [], "--config: missing; allowed: "),
                ("config", ["--config=gone.py"], "--config: No such file .*'gone.py'; allowed: "),
                ("config=", ["--config="], "--config: .*empty"),
                ("folder", ["--config=."], "--config: Is a directory: '.'"),
                ("field", [*recipe, "--config.etta=1"], "unknown config field: 'etta'"),
                ("no value", [*recipe, "--config.seed="], "flag --config.seed=: invalid literal"),
                ("type", [*recipe, "--config.seed=x"], "flag --config.seed=x: invalid literal"),
            ):
                cases[f"{entry}, {case}"] = ([entry, *flags, *needed], text)
            if entry != "pretrain":
                bad = [entry, f"{recipe[0]}:method=foo", *needed]
                cases[f"{entry}, method"] = (bad, "method: got 'foo'; allowed: sage, ")
    return cases


CASES = _of_flags() | {
    "another entry's recipe": (
        ["pretrain", SMALL, "--workdir=new"],
        "pretraining config: unknown sections",
    ),
    "stages": (
        ["pretrain", RECIPES["pretrain"], "--workdir=new", "--stages="],
        "--stages: empty; allowed: some of vae, ",
    ),
    "runs with a gap": (["report", "--runs=a,,b", "--out=new"], "--runs: empty"),
    "no run": (["report", "--runs=a", "--out=new"], "--runs: a has no summary.json; allowed: "),
    "enum": (["encode_prompts", *NEEDED["encode_prompts"], "--dtype=x"], "flag --dtype=x: "),
    "no prompts": (["encode_prompts", *NEEDED["encode_prompts"]], "--prompts: a.txt: No such file"),
    "port": (["serve_rewards", "--backend=moving_shapes", "--port=-1"], "flag --port=-1: "),
    "backend": (["serve_rewards", "--backend=x", "--port=0"], "backend = 'x': allowed are "),
    "backend's module": (
        ["serve_rewards", "--backend=no.such:X", "--port=0"],
        "backend = 'no.such:X': there is no module 'no'",
    ),
    "host": (
        ["serve_rewards", *NEEDED["serve_rewards"], "--host=0.0.0.0"],
        "--host = 0.0.0.0: allowed are loopback addresses",
    ),
    "eta of ode": (["sample", SMALL, *NEEDED["sample"], "--eta=3"], "--eta: got 3.0; allowed: 0 "),
    "seeds": (["sample", SMALL, *NEEDED["sample"], "--seeds=²"], "--seeds: got '²'; allowed: "),
    "prompts": (["sample", SMALL, "--prompts=gone.txt", "--out=new"], "--prompts: .*'gone.txt'"),
    "mesh of sample": (
        ["sample", SMALL, *NEEDED["sample"], "--config.mesh.data=0"],
        "config.mesh: got {'data': 0",
    ),
    "mesh of evaluate": (
        ["evaluate", SMALL, "--out=new", "--config.mesh.data=3"],
        "config.(mesh|loss.micro_batch): .*allowed: ",
    ),
    "weights of evaluate": (
        ["evaluate", SMALL, "--out=new", "--config.model.vae=."],
        "config.model.vae: ",
    ),
    "checkpoint": (
        ["evaluate", SMALL, "--out=new", "--checkpoint=gone"],
        "--checkpoint: gone: no such folder; allowed: ",
    ),
    "no prompts file": (
        ["train", SMALL, "--workdir=new", "--config.data.train_prompts="],
        "config.data.train_prompts: no file is named; allowed: a .txt",
    ),
    "frames": (
        [
            "train",
            SMALL,
            "--workdir=new",
            "--config.video.frames=6",
            "--config.eval.manifold_distance=False",
            "--config.eval.shape_identity=False",
        ],
        "config.video.frames: got 6; allowed: 1 \\+ a multiple of 4",
    ),
    "index": (
        ["sweep", RECIPES["sweep"], "--workdir=new", "--index=45"],
        "--index: got 45; allowed: 0 to 44",
    ),
    "out of evaluate": (["evaluate", SMALL, f"--out={FILE}"], f"--out: {FILE} cannot be used: "),
    "out of sample": (
        ["sample", SMALL, NEEDED["sample"][0], f"--out={FILE}/below"],
        f"--out: {FILE}/below cannot be used: ",
    ),
    "workdir of sweep": (
        ["sweep", RECIPES["sweep"], f"--workdir={FILE}", "--index=0"],
        f"--workdir: {FILE} cannot be used: ",
    ),
    "workdir of pretrain": (
        ["pretrain", RECIPES["pretrain"], f"--workdir={FILE}"],
        f"--workdir: {FILE} cannot be used: ",
    ),
}
# These have to open the prompts first, which are written into the folder of the results.
MAKE_FOLDER = ("checkpoint", "prompts", "no prompts file")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Name -> (result, the path of FILE, the folder that it ran in)."""
    file = tmp_path_factory.mktemp("file") / "file"
    file.write_text("something")
    here = tmp_path_factory.mktemp("here")
    commands = [[flag.replace(FILE, str(file)) for flag in line] for line, _ in CASES.values()]
    silent = [name not in MAKE_FOLDER for name in CASES]
    # Those that leave a folder last.
    order = sorted(range(len(commands)), key=lambda i: not silent[i])
    split = sum(silent)
    found = run_all([commands[i] for i in order[:split]], here)
    left = sorted(path.name for path in here.iterdir())
    found += run_all([commands[i] for i in order[split:]], here)
    names = list(CASES)
    return {names[i]: result for i, result in zip(order, found, strict=True)}, file, left


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_status_2(results, name):
    found, file, _ = results
    result, expected = found[name], CASES[name][1]
    assert result.status == 2, result
    assert result.stdout == ""
    assert re.match(r"error: " + expected.replace(FILE, re.escape(str(file))), result.stderr), (
        result.stderr
    )
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")


def test_mistakes_leave_nothing_behind(results):
    assert results[2] == []
    assert results[1].read_text() == "something"


def test_a_recipe_is_code(tmp_path):
    """Whatever a config file raises, or returns."""
    bodies = {
        "def get_config(): return 5": "--config: get_config returns 5; allowed: a ConfigDict",
        "def get_config(): return unknown": "--config: NameError: name 'unknown' is not defined",
        "get = 1": "--config: AttributeError: module .* has no attribute 'get_config'",
        "import no_such_thing": "--config: ModuleNotFoundError: No module named 'no_such_thing'",
        "get_config = (": "--config: SyntaxError: ",
        "open('gone.txt')": "--config: No such file or directory: 'gone.txt'",
        "from sage_grpo_jax.config import schema as c\n"
        "def get_config():\n  x = c.default_config()\n  x.etta = 1\n  return x": (
            "unknown config field: 'etta'$"
        ),
        "def get_config(): pass": "--config: ",
    }
    commands = []
    for number, body in enumerate(bodies):
        file = tmp_path / f"recipe{number}.py"
        file.write_text(body + "\n")
        commands.append(["schedule", f"--config={file}"])
    for result, expected in zip(run_all(commands, tmp_path), bodies.values(), strict=True):
        assert result.status == 2
        assert re.match(f"error: {expected}", result.stderr), result.stderr
        assert result.stderr.count("\n") == 1


def test_debug_shows_the_trace(tmp_path):
    flags = ["--verbosity=1", SMALL]
    parsing, running = run_all(
        [["schedule", *flags, "--config.etta=1"],
         ["schedule", *flags, "--config.rollout.eta=-1"]], tmp_path,
    )  # fmt: skip
    for result in (parsing, running):
        assert result.status == 1
        assert "Traceback" in result.stderr


def test_embeddings_of_another_encoder_than_the_run(tmp_path):
    """`evaluate` and `sample` of a run, before its weights are loaded."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "encoder.json").write_text('{"name": "another"}')
    flags = [SMALL, f"--checkpoint={run}", "--out=new"]
    evaluated, sampled = run_all(
        [["evaluate", *flags], ["sample", *flags, "--prompts=moving_shapes:held_out"]], tmp_path
    )
    for result, field in (
        (evaluated, "config.data.eval_prompts: moving_shapes:validation"),
        (sampled, "--prompts: moving_shapes:held_out"),
    ):
        assert result.status == 2
        assert result.stderr.startswith(f"error: {field} comes from another encoder than "), result
        assert result.stderr.count("\n") == 1
