"""The command line: runs in and out, adapters, errors, and processes that are killed."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

from sage_grpo_jax import convert, weights
from sage_grpo_jax.common import command_line
from sage_grpo_jax.models import hunyuan_video, lora
from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.models.lora import LoraConfig
from sage_grpo_jax.training import checkpoint, state
from sage_grpo_jax.weights import store

CONFIG = HunyuanVideoConfig(
    in_channels=9,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    text_embed_dim=6,
    text_embed_2_dim=None,
    image_embed_dim=None,
    rope_axes_dim=(2, 2, 4),
)
LORA = LoraConfig(rank=2, alpha=3.0, targets=("query", "mlp/in"))


def random_tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def abstract_params():
    return jax.eval_shape(lambda key: hunyuan_video.init_params(CONFIG, key), jax.random.key(0))


@pytest.fixture
def params():
    return random_tree(abstract_params())


def run(*arguments, **flags):
    """The command in this process; its exit code, or 0."""
    values = {name: str(value) for name, value in flags.items()}
    with flagsaver.flagsaver():
        argv = ["convert", *arguments, *(f"--{name}={value}" for name, value in values.items())]
        before = signal.getsignal(signal.SIGTERM)
        try:
            command_line.parse_flags(argv)
            command_line.call(convert.main)
        except SystemExit as stop:
            return stop.code
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


def write_run(workdir, params, description=None, ema=False):
    """What a training run leaves: two checkpoints, the model's config, the adapters' config.

    `ema`: with a moving average, which is half of the parameters.
    """
    workdir.mkdir(parents=True)
    (workdir / "transformer.json").write_text(CONFIG.to_json())
    if description is not None:
        (workdir / "lora.json").write_text(json.dumps(description))
    checkpoints = checkpoint.Checkpoints(workdir, every=1, keep=2)
    for step, factor in ((3, 0.0), (12, 1.0)):
        tree = jax.tree.map(lambda leaf, factor=factor: jnp.asarray(leaf) * factor, params)
        average = jax.tree.map(lambda leaf: 0.5 * leaf, tree) if ema else None
        content = state.LearnerState(tree, {"moment": tree}, jnp.asarray(step), average)
        checkpoints.save(step, content, {"position": np.asarray(step)}, {"seed": 1})
    checkpoints.close()
    return workdir


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_run_to_every_format(params, tmp_path):
    workdir = write_run(tmp_path / "run", params)
    for source in (workdir, workdir / "checkpoints"):
        target = tmp_path / f"from_{source.name}"
        assert run(src=source, src_format="orbax", dst=target, dst_format="orbax") == 0
        assert weights.load_config(target) == CONFIG
        assert_trees_equal(weights.load(target, CONFIG), params)
    for format in ("diffusers", "tencent"):
        target = tmp_path / format
        assert run(src=workdir, src_format="orbax", dst=target, dst_format=format) == 0
        assert_trees_equal(weights.load(target, CONFIG), params)


def test_the_moving_average_of_a_run(params, tmp_path, capsys):
    workdir = write_run(tmp_path / "run", params, ema=True)
    for key, factor in (("ema", 0.5), ("module", 1.0)):
        flags = {"src": workdir, "src_format": "orbax", "dst": tmp_path / key, "src_key": key}
        assert run(**flags, dst_format="diffusers") == 0
        wanted = jax.tree.map(lambda leaf, factor=factor: np.float32(factor) * leaf, params)
        assert_trees_equal(weights.load(tmp_path / key, CONFIG), wanted)
    without = write_run(tmp_path / "without", params)
    flags = {"src": without, "src_format": "orbax", "dst": tmp_path / "none"}
    assert run(**flags, dst_format="orbax", src_key="ema") == 2
    assert "keeps no moving average of its parameters" in capsys.readouterr().err
    assert run(**flags, dst_format="orbax", src_key="best") == 2
    assert "src_key='best': must be module or ema" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_run_with_adapters(params, tmp_path):
    adapters = random_tree(lora.abstract_adapters(abstract_params(), LORA, hunyuan_video), seed=1)
    weights.save(params, tmp_path / "base", config=CONFIG)
    description = {"rank": 2, "alpha": 3.0, "targets": LORA.targets, "base": str(tmp_path / "base")}
    workdir = write_run(tmp_path / "run", adapters, description)
    assert run(src=workdir, src_format="orbax", dst=tmp_path / "lora", dst_format="peft") == 0
    found, config = weights.load_adapters(tmp_path / "lora", CONFIG)
    assert config == LORA
    assert_trees_equal(found, adapters)

    merged = lora.merge(params, adapters, LORA.scale)

    def check(folder):
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-6),
            weights.load(folder, CONFIG),
            merged,
        )

    for format in ("diffusers", "tencent", "orbax"):
        out = tmp_path / format
        assert run(src=workdir, src_format="orbax", dst=out, dst_format=format) == 0
        check(out)
    # From a file of adapters, and from a folder of ours, into a base in another format.
    out, base = tmp_path / "merged", tmp_path / "base_orbax"
    weights.save(params, base, "orbax", config=CONFIG)
    flags = {"base": base, "dst_format": "diffusers"}
    assert run(src=tmp_path / "lora", src_format="peft", dst=out, **flags) == 0
    check(out)
    weights.save_adapters(adapters, tmp_path / "ours", LORA, CONFIG, "orbax")
    assert run("--overwrite", src=tmp_path / "ours", src_format="orbax", dst=out, **flags) == 0
    check(out)


def test_adapters_between_their_formats(tmp_path):
    adapters = random_tree(lora.abstract_adapters(abstract_params(), LORA, hunyuan_video))
    weights.save_adapters(adapters, tmp_path / "peft", LORA, CONFIG)
    config = tmp_path / "model.json"
    config.write_text(CONFIG.to_json())
    flags = {"dst": tmp_path / "orbax", "dst_format": "orbax"}
    assert run(src=tmp_path / "peft", src_format="peft", config_json=config, **flags) == 0
    flags = {"dst": tmp_path / "again", "dst_format": "peft"}
    assert run(src=tmp_path / "orbax", src_format="orbax", **flags) == 0
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def test_errors_are_one_line_and_exit_with_2(params, tmp_path, capsys):
    adapters = random_tree(lora.abstract_adapters(abstract_params(), LORA, hunyuan_video))
    description = {"rank": 2, "alpha": 3.0, "targets": LORA.targets, "base": "gone"}
    workdir = write_run(tmp_path / "run", adapters, description)
    weights.save(params, tmp_path / "model", config=CONFIG)
    weights.save_adapters(adapters, tmp_path / "lora", LORA, CONFIG)
    (tmp_path / "empty").mkdir()
    other = {"dst": tmp_path / "out", "dst_format": "diffusers"}
    for flags, message in (
        ({"src": workdir, "src_format": "orbax", **other}, "base=gone: no such file"),
        ({"src": tmp_path / "empty", "src_format": "orbax", **other}, "nor the workdir of a run"),
        ({"src": tmp_path / "lora", "src_format": "peft", **other}, "--base (or --config_json)"),
        ({"src": tmp_path / "model", "src_format": "tencent", **other}, "in the diffusers layout"),
        ({"src": tmp_path / "model", "src_format": "gguf", **other}, "src_format='gguf'"),
        ({"src": tmp_path / "empty", "src_format": "diffusers", **other}, "must hold one"),
        (
            {"src": tmp_path / "model", "src_format": "diffusers", **other, "dst_format": "peft"},
            "holds a whole model, no adapters",
        ),
    ):
        assert run(**flags) == 2
        found = capsys.readouterr().err.strip()
        assert found.startswith("error: ")
        assert message in found
        assert "\n" not in found
    assert not (tmp_path / "out").exists()


def test_a_training_run_is_not_taken_for_weights(params, tmp_path, capsys):
    """It has a config.json too."""
    weights.save(params, tmp_path / "model", config=CONFIG)
    workdir = write_run(tmp_path / "run", params)
    (workdir / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    flags = {"src": tmp_path / "model", "src_format": "diffusers", "dst_format": "diffusers"}
    assert run("--overwrite", dst=workdir, **flags) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: dst={workdir}: holds checkpoints/")
    assert "it is not replaced. Allowed: another folder" in said
    assert said.count("\n") == 1
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_done_is_the_last_line(params, tmp_path, capsys):
    weights.save(params, tmp_path / "model", config=CONFIG)
    flags = {"src": tmp_path / "model", "src_format": "diffusers", "dst": tmp_path / "out"}
    assert run(**flags, dst_format="diffusers", dtype="bfloat16") == 0
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * 2 / 1e9
    assert capsys.readouterr().out == (
        f"done: transformer, diffusers, bfloat16, {size:.3g} GB; see {tmp_path / 'out'}\n"
    )


def test_paths_with_dots_and_links(params, tmp_path, monkeypatch):
    """Read and written, orbax too; a link stays, and its target is what is replaced."""
    (tmp_path / "here").mkdir()
    (tmp_path / "disk" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    weights.save(params, "../model", "orbax", config=CONFIG)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one, params)
    assert_trees_equal(weights.load("../model", CONFIG, shardings), params)
    (tmp_path / "link").symlink_to("disk/out")
    from_orbax = {"src": "../model", "src_format": "orbax", "dst_format": "diffusers"}
    from_diffusers = {"src": "../next", "src_format": "diffusers", "dst_format": "orbax"}
    assert run(**from_orbax, dst="../here/../next") == 0
    for flags in (from_diffusers, from_orbax):  # the link leads to an empty folder first
        assert run("--overwrite", **flags, dst="../link") == 0
        assert (tmp_path / "link").is_symlink()
        assert_trees_equal(weights.load("../link", CONFIG), params)
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "here", "link", "model", "next"]


def test_a_run_behind_dots_and_links(params, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_run(pathlib.Path("../run"), params)
    (tmp_path / "link").symlink_to("run")
    for name in ("run", "link"):
        flags = {"src": f"../{name}", "src_format": "orbax"}
        assert run(**flags, dst=f"../{name}_out", dst_format="diffusers") == 0
        assert_trees_equal(weights.load(tmp_path / f"{name}_out", CONFIG), params)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), params)
    assert_trees_equal(checkpoint.restore_params("../run", abstract), params)


def command(**flags):
    return [sys.executable, "-m", "sage_grpo_jax.convert",
            *(f"--{name}={value}" for name, value in flags.items())]  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A source that takes a while to convert."""
    config = HunyuanVideoConfig(num_layers=1, num_refiner_layers=1, num_attention_heads=4)
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32),
        jax.eval_shape(lambda key: hunyuan_video.init_params(config, key), jax.random.key(0)),
    )
    path = tmp_path_factory.mktemp("large") / "model"
    weights.save(params, path, config=config)
    return path


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_half_way(how, large, tmp_path):
    """The process is stopped as soon as some of the data is written."""
    target = tmp_path / "out"
    flags = {"src": large, "src_format": "diffusers", "dst": target, "dst_format": "orbax"}
    process = subprocess.Popen(command(**flags), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not _written(tmp_path) > 5e6:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    process.communicate(timeout=600)
    assert process.returncode == (-9 if how == signal.SIGKILL else 143)
    assert not target.exists()
    left = list(tmp_path.iterdir())
    assert all(path.name.startswith(".out.") for path in left)
    assert len(left) == (how == signal.SIGKILL)

    flags["dst_format"] = "diffusers"
    assert run(**flags) == 0
    assert list(tmp_path.iterdir()) == [target]
    name = f"{store.STEM}.safetensors"
    assert (target / name).read_bytes() == (large / name).read_bytes()


def _written(folder: pathlib.Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total
