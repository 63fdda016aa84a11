"""`sample` from prompts to files: batches, resumption, caches, checkpoints; tiny networks."""

import dataclasses
import json
import pathlib

import grain
import jax
import numpy as np
import pytest

from sage_grpo_jax import weights
from sage_grpo_jax.data import embedding_cache, media
from sage_grpo_jax.data.prompts import Prompt
from sage_grpo_jax.models import hunyuan_video, lora
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.policy import sampler
from sage_grpo_jax.sampling import run, sources
from sage_grpo_jax.training import checkpoint

CAPTIONS = ("a red disk", "a blue square moves", "green")


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS))
    return str(path)


@pytest.fixture
def clips(monkeypatch) -> dict[str, np.ndarray]:
    """The frames that are written, by file name; the files themselves are empty."""
    written: dict[str, np.ndarray] = {}

    def write(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
        assert path.name not in written
        written[path.name] = frames
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(media, "write_clip", write)
    monkeypatch.setattr(run.outputs, "write_sheet", lambda *args: None)
    return written


def _request(prompts: str, out: pathlib.Path, **fields) -> run.Request:
    return run.Request(**({"source": sources.Source(), "prompts": prompts, "out": out} | fields))


def _sample(config, request: run.Request) -> int:
    """On the first devices, as many as the mesh has."""
    mesh = config.mesh
    count = mesh.data * mesh.fsdp * mesh.context
    return run.sample(config, request, jax.devices()[:count])


def _assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(want)
    for name, frames in got.items():
        # A value may lie on the border between two levels.
        assert np.abs(frames.astype(int) - want[name]).max() <= 1, name


def test_files_record_and_resumption(make_config, prompts, tmp_path, monkeypatch, capsys):
    request = _request(prompts, tmp_path / "out", seeds=(0, 5), batch_size=2)
    request = dataclasses.replace(request, overrides={"format": "both"})
    assert _sample(make_config(), request) == 6  # two at a time
    names = {f"{i:03d}_{i + 1:06d}_seed{seed}" for i in range(3) for seed in (0, 5)}
    found = {p.name for p in request.out.iterdir() if p.is_file()}
    assert found == {f"{name}.{suffix}" for name in names for suffix in ("mp4", "gif")} | {
        "samples.jsonl",
        "contact_sheet.png",
        "sage_grpo_jax_manifest.json",
    }
    clip = media.read_clip(request.out / "001_000002_seed5.mp4")
    assert clip.shape == (3, 16, 16, 3)
    rows = [json.loads(line) for line in (request.out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [text for text in CAPTIONS for _ in range(2)]
    assert {row["settings"]["steps"] for row in rows} == {2}
    assert "6/6 videos" in capsys.readouterr().err

    (request.out / "001_000002_seed5.gif").unlink()
    assert _sample(make_config(), request) == 1
    assert (request.out / "001_000002_seed5.gif").exists()
    again = media.read_clip(request.out / "001_000002_seed5.mp4")
    assert np.abs(again.astype(int) - clip).mean() < 1

    monkeypatch.setattr(sources, "load", None)  # a finished folder needs no weights
    assert _sample(make_config(), request) == 0
    other = make_config({"eval.num_steps": 3})
    with pytest.raises(ValueError, match="other settings: steps was 2, is 3"):
        _sample(other, request)


def test_batch_size_and_mesh_change_nothing(make_config, prompts, tmp_path, clips):
    _sample(make_config(), _request(prompts, tmp_path / "a", batch_size=2))
    by_two = dict(clips)
    clips.clear()
    # Four at a time on two devices: one row is padding.
    config = make_config({"mesh.data": 2, "rollout.decode_batch": 4})
    _sample(config, _request(prompts, tmp_path / "b"))
    _assert_same(clips, by_two)
    first, last = (by_two[f"{name}_seed0.mp4"].astype(int) for name in ("000_000001", "002_000003"))
    assert np.abs(first - last).max() > 5


def test_a_cache_with_quotes_and_images(make_config, make_reference, tmp_path, clips):
    """Every clip is made as if it were alone: padding and neighbours leave no trace."""
    path = make_reference(task_type="i2v").path
    config = make_config({"model.transformer": f"{path}/transformer", "data.text_encoder": "cache"})
    rng = np.random.default_rng(0)
    entries = [
        {
            "text": rng.standard_normal((length, 8), np.float32),
            "image": rng.standard_normal((4, 5), np.float32),
            "image_latents": rng.standard_normal((1, 4, 4, 4), np.float32),
        }
        for length in (3, 11, 5)
    ]
    entries[1]["byt5"] = rng.standard_normal((7, 6), np.float32)
    negative = rng.standard_normal((2, 8), np.float32)

    def write(name: str, rows: list[int]) -> str:
        encoder = embedding_cache.Encoder("random")
        folder = tmp_path / name
        with embedding_cache.EmbeddingCacheWriter(folder, encoder, "float32") as writer:
            for row in rows:
                writer.add(Prompt(f"id{row}", f"prompt {row}"), **entries[row])
            writer.set_negative(negative)
        return str(folder)

    _sample(config, _request(write("all", [0, 1, 2]), tmp_path / "a", batch_size=2))
    together = {name.partition("_")[2]: frames for name, frames in clips.items()}
    for row in range(3):
        clips.clear()
        _sample(config, _request(write(f"{row}", [row]), tmp_path / f"out{row}", batch_size=2))
        ((name, frames),) = clips.items()
        assert np.abs(frames.astype(int) - together[name.partition("_")[2]]).max() <= 1


def _adapters(networks: networks_lib.Networks, config: lora.LoraConfig) -> dict:
    """Random adapters, none of them zero."""
    params = networks_lib.abstract_params(networks.transformer)
    shapes = lora.abstract_adapters(params, config, hunyuan_video)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: np.float32(0.3) * rng.standard_normal(s.shape, np.float32), shapes
    )


def _write_run(workdir: pathlib.Path, params) -> None:
    """A checkpoint as a training run leaves it."""
    saver = checkpoint.Checkpoints(workdir, every=1, keep=1)
    iterator = iter(grain.MapDataset.range(3).to_iter_dataset())
    saver.save(4, {"params": params}, iterator, {"seed": 0})
    saver.wait()
    saver.close()


def test_runs_and_adapters_equal_merged_weights(make_config, prompts, tmp_path, clips):
    targets = ("query", "blocks/text/mlp/out", "text_refiner/blocks/value", "final/proj")
    config, adapted = make_config(), lora.LoraConfig(3, 4.5, targets)
    networks = networks_lib.read_networks(config.model)
    adapters = _adapters(networks, adapted)
    base = str(networks.transformer_path.absolute())
    _write_run(tmp_path / "run", adapters)
    record = {**dataclasses.asdict(adapted), "base": base}
    (tmp_path / "run/lora.json").write_text(json.dumps(record))
    params = weights.load(networks.transformer_path, networks.transformer)
    merged = lora.merge(params, adapters, adapted.scale)
    weights.save(merged, tmp_path / "merged", config=networks.transformer)
    _write_run(tmp_path / "full", jax.tree.map(np.asarray, merged))
    weights.save_adapters(adapters, tmp_path / "peft", adapted, networks.transformer)

    kinds = {
        "merged": sources.Source(weights=str(tmp_path / "merged")),
        "run": sources.Source(checkpoint=str(tmp_path / "run")),
        "full": sources.Source(checkpoint=str(tmp_path / "full")),
        "peft": sources.Source(adapters=str(tmp_path / "peft")),
        "plain": sources.Source(),
    }
    made = {}
    for name, source in kinds.items():
        clips.clear()
        _sample(config, _request(prompts, tmp_path / name / "out", source=source, batch_size=2))
        made[name] = dict(clips)
    _assert_same(made["run"], made["merged"])
    _assert_same(made["full"], made["merged"])
    _assert_same(made["peft"], made["merged"])
    plain, tuned = (made[name]["000_000001_seed0.mp4"].astype(int) for name in ("plain", "run"))
    assert np.abs(plain - tuned).max() > 5
    row = json.loads((tmp_path / "run/out/samples.jsonl").read_text().splitlines()[0])
    assert row["settings"]["step"] == 4

    moved = make_config({"model.transformer": str(tmp_path / "merged")})
    with pytest.raises(ValueError, match=r"--checkpoint: the adapters of .* were trained on"):
        sources.adapt_config(moved, kinds["run"])
    explicit = dataclasses.replace(kinds["run"], weights=base)
    assert sources.adapt_config(moved, explicit).lora.adapters == adapted


def test_damaged_weights_end_in_one_line(make_config, prompts, tmp_path, capfd):
    config = make_config()
    networks = networks_lib.read_networks(config.model)
    params = weights.load(networks.transformer_path, networks.transformer)
    weights.save(params, tmp_path / "orbax", "orbax", config=networks.transformer)
    source = sources.Source(weights=str(tmp_path / "orbax"))
    (tmp_path / "orbax/params/state/blocks.text.key.bias/zarr.json").write_text("{")
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"orbax/.*blocks\.text\.key\.bias cannot be read"):
        _sample(config, _request(prompts, tmp_path / "out", source=source))
    # Beside the note on the prompts nothing is said: not by orbax's threads either.
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith("note: --prompts: ")] == []


def test_nan_in_a_run_is_told_before_anything_is_made(make_config, prompts, tmp_path):
    config, adapted = make_config(), lora.LoraConfig(2, 2.0, ("key",))
    networks = networks_lib.read_networks(config.model)
    adapters = _adapters(networks, adapted)
    adapters["blocks"]["image"]["key"]["up"][0, 0, 0] = np.nan
    _write_run(tmp_path / "run", adapters)
    record = {**dataclasses.asdict(adapted), "base": str(networks.transformer_path.absolute())}
    (tmp_path / "run/lora.json").write_text(json.dumps(record))
    source = sources.Source(checkpoint=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"--checkpoint: .*run: blocks/image/key/up hold NaN"):
        _sample(config, _request(prompts, tmp_path / "out", source=source))
    for damage in ("[", "{}", '{"rank": 2, "alpha": [1], "targets": ["key"], "base": "x"}'):
        (tmp_path / "run/lora.json").write_text(damage)
        with pytest.raises(ValueError, match=r"run/lora\.json: "):
            _sample(config, _request(prompts, tmp_path / "out", source=source))


def test_clips_that_are_not_finite_are_told(
    make_config, prompts, tmp_path, clips, monkeypatch, capsys
):
    monkeypatch.setattr(sampler.Sampler, "finite", lambda self, latents: np.array([True, False]))
    _sample(make_config(), _request(prompts, tmp_path / "out", batch_size=2))
    assert "warning: 001_000002_seed0 has values that are not finite" in capsys.readouterr().err
    text = (tmp_path / "out/samples.jsonl").read_text()
    assert ["finite" in line for line in text.splitlines()] == [False, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": "missing.txt"}, "--prompts: .*missing.txt"),
        ({"batch_size": 0}, "--batch_size: got 0"),
        ({"overrides": {"frames": 4}}, "--frames: got 4; allowed: 1 \\+ a multiple of 2"),
        ({"source": sources.Source(weights="nowhere")}, "--weights: got 'nowhere'"),
        ({"source": sources.Source(checkpoint="nowhere")}, "--checkpoint: nowhere has no folder"),
        ({"source": sources.Source(checkpoint="a", adapters="b")}, "both given"),
    ],
)
def test_bad_requests_are_refused(make_config, prompts, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        _sample(make_config(), _request(**{"prompts": prompts, "out": tmp_path} | fields))


def test_batches_divide_over_the_mesh_and_decoding_divides_them(make_config):
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, context=2)
    config = make_config({"rollout.decode_batch": 8, "rollout.prompts_per_step": 16})
    assert run._default_batch_size(100, config, mesh) == 8
    assert run._default_batch_size(5, config, mesh) == 8
    assert run._default_batch_size(1, config, mesh) == 4
    assert [run._decode_batch(size, config, mesh) for size in (4, 12, 16, 24)] == [4, 4, 8, 8]
    with pytest.raises(ValueError, match="--batch_size: got 6; allowed: a multiple of the 4 parts"):
        run._check_batch_size(6, mesh)
