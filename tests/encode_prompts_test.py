"""The command line as a whole: caches against diffusers' pipeline; killed runs; bad input."""

import dataclasses
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Pipeline
from transformers import AutoTokenizer, Qwen2_5_VLTextModel, T5EncoderModel

from sage_grpo_jax.common import files, manifest
from sage_grpo_jax.data.embedding_cache import EmbeddingCache, make_prompt_iterator
from sage_grpo_jax.text_encoders import encode as encode_lib
from sage_grpo_jax.text_encoders import first_frame, qwen
from sage_grpo_jax.text_encoders import work as work_lib

sys.path.insert(0, str(pathlib.Path(__file__).parent / "text_encoders"))
import tiny_models

TEXTS = ['a "red" cat', "a dog", "the grass “STOP” there", "word " * 1200, "a cat walks", "sky"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.csv"
    rows = [f'p{i},"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(TEXTS)]
    file.write_text("\n".join(["id,prompt", *rows]) + "\n")
    return file


def request(pipeline, prompts, out, **changes):
    fields = {"byt5": str(pipeline), "batch_size": 2, "dtype": "float32", "device": "cpu"}
    return encode_lib.Request(str(prompts), str(pipeline), str(out), **(fields | changes))


@pytest.fixture(scope="module")
def encode_with_diffusers(pipeline):
    """`encode_prompt` of diffusers' pipeline, made without the networks that it does not use."""
    pipe = object.__new__(HunyuanVideo15Pipeline)
    pipe.text_encoder = Qwen2_5_VLTextModel.from_pretrained(pipeline / "text_encoder")
    pipe.tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    pipe.text_encoder_2 = T5EncoderModel.from_pretrained(pipeline / "text_encoder_2")
    pipe.tokenizer_2 = AutoTokenizer.from_pretrained(pipeline / "tokenizer_2")
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 1000, 256
    defaults = inspect.signature(pipe._get_mllm_prompt_embeds).parameters
    pipe.system_message = defaults["system_message"].default

    def encode(prompts: list[str], crop_start: int) -> list[np.ndarray]:
        vars(pipe)["prompt_template_encode_start_idx"] = crop_start
        with torch.no_grad():
            found = pipe.encode_prompt(prompts, torch.device("cpu"), batch_size=len(prompts))
        return [tensor.numpy() for tensor in found]

    return encode


def assert_is_diffusers(cache: EmbeddingCache, encode) -> None:
    """Every entry, and the negative one, against `encode_prompt`; padded, the masks are equal."""
    entries = [*(cache[i] for i in range(len(cache))), cache.negative]
    texts = [entry["prompt"] for entry in entries]
    text, mask, byt5, byt5_mask = encode(texts, cache.manifest["details"]["crop_start"])
    padded = cache.pad(entries, length=1000, byt5_length=256)
    np.testing.assert_array_equal(padded["mask"], mask)
    np.testing.assert_array_equal(padded["byt5_mask"], byt5_mask)
    np.testing.assert_allclose(padded["text"], text * mask[..., None], atol=1e-5)
    np.testing.assert_allclose(padded["byt5"], byt5 * byt5_mask[..., None], atol=1e-5)
    assert byt5_mask.any(axis=1).tolist() == [True, False, True, False, False, False, False]


# The command, but dead without a word after so many finished batches.
KILLED = """
import os, sys
from sage_grpo_jax.text_encoders import work
written = 0
write = work.WorkFolder.write
def write_and_die(*args):
    global written
    write(*args)
    written += 1
    if written == {batches}:
        os._exit(9)
work.WorkFolder.write = write_and_die
from sage_grpo_jax import encode_prompts
from sage_grpo_jax.common import command_line
command_line.run(encode_prompts.main)
"""


@pytest.mark.slow
def test_the_command_killed_and_run_again(pipeline, prompts, tmp_path, encode_with_diffusers):
    flags = [f"--prompts={prompts}", f"--text_encoder={pipeline}", f"--byt5={pipeline}",
             "--batch_size=2", "--dtype=float32", "--device=cpu"]  # fmt: skip
    out = tmp_path / "cache"
    killed = run("-c", KILLED.format(batches=2), *flags, f"--out={out}")
    assert killed.returncode == 9, killed.stderr
    assert not out.exists()
    assert sorted(file.name for file in (tmp_path / "cache.partial").iterdir()) == [
        manifest.FILE, "settings.json", "text-000000.npz", "text-000001.npz"]  # fmt: skip

    again = run("-m", "sage_grpo_jax.encode_prompts", *flags, f"--out={out}")
    assert again.returncode == 0, again.stderr
    assert f"{out}: 6 prompts (6 text, 2 byt5), float32" in again.stdout
    assert re.search(r"done before: \d+ tokens of prompts", again.stderr)
    assert "whose ends are cut: 1" in again.stderr
    assert not (tmp_path / "cache.partial").exists()

    cache = EmbeddingCache(out)
    assert_is_diffusers(cache, encode_with_diffusers)
    assert [cache[i]["id"] for i in range(6)] == [f"p{i}" for i in range(6)]
    assert [cache[i]["prompt"] for i in range(6)] == [text.strip() for text in TEXTS]

    encode_lib.encode(request(pipeline, prompts, tmp_path / "whole"))
    assert sorted(file.name for file in out.iterdir()) == [
        "embeddings.array_record",
        "manifest.json",
        manifest.FILE,
    ]
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=pathlib.Path(__file__).parent.parent,
    )


def test_the_manifest_says_what_was_used(pipeline, prompts, tmp_path):
    cache = encode_lib.encode(request(pipeline, prompts, tmp_path / "cache"))
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert (manifest["dim"], manifest["byt5_dim"]) == (tiny_models.TEXT_DIM, tiny_models.BYT5_DIM)
    assert manifest["counts"] == {"text": 6, "byt5": 2, "image": 0, "image_latents": 0}
    assert manifest["max_length"] == 1000
    assert manifest["encoder"]["versions"]["torch"] == torch.__version__
    assert manifest["details"]["truncated"] == 1
    cache.check_fits(text_dim=tiny_models.TEXT_DIM, byt5_dim=tiny_models.BYT5_DIM)
    # Another model, another cache: one weight file that differs in its header.
    other = shutil.copytree(pipeline, tmp_path / "other")
    weights = other / "text_encoder" / "model.safetensors"
    model = Qwen2_5_VLTextModel.from_pretrained(other / "text_encoder", dtype=torch.bfloat16)
    model.save_pretrained(other / "text_encoder")
    assert weights.stat().st_size != (pipeline / "text_encoder" / weights.name).stat().st_size
    again = encode_lib.encode(request(other, prompts, tmp_path / "again", byt5=None))
    assert again.byt5_dim is None
    assert again.encoder.models["text_encoder"] != cache.encoder.models["text_encoder"]
    assert again.encoder.models["tokenizer"] == cache.encoder.models["tokenizer"]


def test_bfloat16_is_the_default_and_near(pipeline, prompts, tmp_path):
    exact = encode_lib.encode(request(pipeline, prompts, tmp_path / "float32"))
    cache = encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", dtype="bfloat16"))
    assert encode_lib.Request("", "", "").dtype == "bfloat16"
    assert cache.manifest["dtype"] == "bfloat16"
    for i in range(len(cache)):
        for field in ("text", "byt5"):
            reference, found = exact[i][field], cache[i][field]
            assert found.shape == reference.shape
            error = np.linalg.norm(found - reference) / max(np.linalg.norm(reference), 1e-9)
            assert error < 0.03
    size = (tmp_path / "cache" / "embeddings.array_record").stat().st_size
    assert size < 0.7 * (tmp_path / "float32" / "embeddings.array_record").stat().st_size


@pytest.mark.parametrize("quoting", [True, False])
def test_a_negative_prompt_that_quotes_text(
    pipeline, prompts, tmp_path, encode_with_diffusers, quoting
):
    """Both encoders read it, also where no other prompt quotes anything."""
    if not quoting:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a dog\nsky\n")
    negative = 'bad “quality”, a "watermark"'
    out = tmp_path / "cache"
    cache = encode_lib.encode(request(pipeline, prompts, out, negative_prompt=negative))
    crop_start = cache.manifest["details"]["crop_start"]
    text, mask, byt5, byt5_mask = encode_with_diffusers([negative], crop_start)
    padded = cache.pad([cache.negative], length=1000, byt5_length=256)
    assert byt5_mask.sum() > 10
    np.testing.assert_array_equal(padded["mask"], mask)
    np.testing.assert_array_equal(padded["byt5_mask"], byt5_mask)
    np.testing.assert_allclose(padded["text"], text * mask[..., None], atol=1e-5)
    np.testing.assert_allclose(padded["byt5"], byt5 * byt5_mask[..., None], atol=1e-5)
    assert cache.byt5_max_length >= byt5_mask.sum()
    if quoting:
        cache.pad([cache[0], cache.negative])
    else:
        assert len(cache[0]["byt5"]) == 0


def test_a_negative_prompt(pipeline, prompts, tmp_path, encode_with_diffusers):
    plain = encode_lib.encode(request(pipeline, prompts, tmp_path / "a")).negative["text"]
    cache = encode_lib.encode(request(pipeline, prompts, tmp_path / "b", negative_prompt="bad"))
    crop_start = cache.manifest["details"]["crop_start"]
    text, mask, _, _ = encode_with_diffusers(["bad", ""], crop_start)
    for row, found in enumerate((cache.negative["text"], plain)):
        assert len(found) == mask[row].sum()
        np.testing.assert_allclose(found, text[row, : len(found)], atol=1e-5)
    assert len(cache.negative["byt5"]) == 0


@pytest.fixture
def illustrated(tmp_path):
    """Prompts with images beside them."""
    file = tmp_path / "illustrated.jsonl"
    lines = []
    for i, text in enumerate(TEXTS[:3]):
        tiny_models.save_image(tmp_path / f"{i}.png", 40 + 10 * i, 60, seed=i)
        lines.append(json.dumps({"id": f"p{i}", "prompt": text, "image": f"{i}.png"}))
    file.write_text("\n".join(lines) + "\n")
    return file


def image_request(pipeline, prompts, out, **changes):
    path = str(pipeline)
    fields = {"image_encoder": path, "vae": path, "height": 32, "width": 48}
    return request(pipeline, prompts, out, **(fields | changes))


def test_image_to_video(pipeline, illustrated, tmp_path):
    cache = encode_lib.encode(image_request(pipeline, illustrated, tmp_path / "cache"))
    images = (tiny_models.IMAGE_TOKENS, tiny_models.IMAGE_DIM)
    latents = (1, 4, 6, tiny_models.LATENT_DIM)
    assert (cache.image_shape, cache.image_latents_shape) == (images, latents)
    # Each prompt has its own image's values; that they are right is tested in first_frame_test.
    features = first_frame.ImageEncoder(
        pipeline / "image_encoder", pipeline / "feature_extractor", "float32", "cpu"
    )
    encode = first_frame.open_latent_encoder(pipeline / "vae")
    for i in range(3):
        image = first_frame.fit_image(first_frame.open_image(tmp_path / f"{i}.png"), 32, 48)
        np.testing.assert_allclose(cache[i]["image"], features([image])[0], atol=1e-5)
        np.testing.assert_array_equal(cache[i]["image_latents"], encode(image))
    assert "image" not in cache.negative
    batch = next(make_prompt_iterator(cache, 2, seed=0, shuffle=False))
    assert batch["image"].shape == (2, *images)
    assert batch["image_latents"].shape == (2, *latents)
    assert batch["byt5"].shape == (2, 64, tiny_models.BYT5_DIM)
    cache.check_fits(text_dim=tiny_models.TEXT_DIM, byt5_dim=tiny_models.BYT5_DIM,
                     image_dim=tiny_models.IMAGE_DIM, latent_shape=latents[1:])  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": "none.csv"}, FileNotFoundError, "none.csv"),
        ({"text_encoder": "none"}, ValueError, "text_encoder=none: no such folder"),
        ({"byt5": "."}, ValueError, r"byt5=.*: no .*text_encoder_2/config.json or .*config.json"),
        ({"dtype": "int8"}, ValueError, "dtype=int8: must be one of bfloat16, float32, float16"),
        ({"device": "tpu"}, ValueError, "device=tpu: must be one of auto, cpu, cuda"),
        ({"device": "cuda"}, ValueError, "device=cuda: torch finds no GPU"),
        ({"batch_size": 0}, ValueError, "batch_size=0: must be at least 1"),
        ({"vae": "."}, ValueError, "image_encoder, height, width: not set"),
    ],
)
def test_bad_requests(pipeline, prompts, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.chdir(tmp_path)
    if changes == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    good = dataclasses.asdict(request(pipeline, prompts, tmp_path / "cache"))
    with pytest.raises(error, match=message):
        encode_lib.encode(encode_lib.Request(**(good | changes)))
    assert sorted(tmp_path.iterdir()) == [prompts]


def test_bad_images(pipeline, illustrated, tmp_path):
    out = tmp_path / "cache"

    def assert_refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            encode_lib.encode(image_request(pipeline, illustrated, out, **changes))
        assert not list(tmp_path.glob("cache*"))

    assert_refused("width=44: must be a positive multiple of 8", width=44)
    assert_refused(r"image_encoder=.*: no .*image_encoder/config.json", image_encoder=str(tmp_path))
    assert_refused(r"vae=.*: no ", vae=str(tmp_path))
    (tmp_path / "2.png").unlink()
    assert_refused(r"2.png: no such image")
    with illustrated.open("a") as file:
        file.write('{"id": "q", "prompt": "no image"}\n')
    tiny_models.save_image(tmp_path / "2.png", 20, 20)
    assert_refused("prompt 'q' has no image")


def test_the_same_work_only(pipeline, prompts, tmp_path, monkeypatch):
    """A work folder belongs to one set of settings; starting over is possible."""
    out, partial = tmp_path / "cache", tmp_path / "cache.partial"
    encode_lib.encode(request(pipeline, prompts, tmp_path / "whole"))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_lib, "_assemble", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode_lib.encode(request(pipeline, prompts, out))
    with pytest.raises(ValueError, match=r"other values of batch_size; .*--noresume"):
        encode_lib.encode(request(pipeline, prompts, out, batch_size=3))
    with pytest.raises(ValueError, match=r"other values of compute_dtype, negative_prompt; "):
        encode_lib.encode(request(pipeline, prompts, out, negative_prompt="x", dtype="bfloat16"))
    prompts.write_text(prompts.read_text().replace("a dog", "a cow"))
    with pytest.raises(ValueError, match="other values of prompts"):
        encode_lib.encode(request(pipeline, prompts, out))
    prompts.write_text(prompts.read_text().replace("a cow", "a dog"))
    (partial / "text-000001.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"text-000001.npz is damaged .*; delete it"):
        encode_lib.encode(request(pipeline, prompts, out))
    (partial / "text-000001.npz").unlink()
    cache = encode_lib.encode(request(pipeline, prompts, out))
    assert cache.fingerprint == EmbeddingCache(tmp_path / "whole").fingerprint
    cache.verify()


def test_killed_before_the_cache_was_published(pipeline, prompts, tmp_path, monkeypatch):
    out, partial = tmp_path / "cache", tmp_path / "cache.partial"

    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work_lib.WorkFolder, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            encode_lib.encode(request(pipeline, prompts, out))
    # As it is between the last record and the last rename.
    half = out.rename(files.temporary_path(out, "new"))
    assert partial.exists()
    assert len(encode_lib.encode(request(pipeline, prompts, out))) == 6
    assert sorted(tmp_path.glob("*cache*")) == [out]
    assert not half.exists()


def test_an_existing_cache_is_kept(pipeline, prompts, tmp_path, monkeypatch):
    out, partial = tmp_path / "cache", tmp_path / "cache.partial"

    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work_lib.WorkFolder, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            encode_lib.encode(request(pipeline, prompts, out))
    before = (out / "embeddings.array_record").read_bytes()
    # The cache is there, and so is the work: the same request only clears up.
    with pytest.raises(FileExistsError, match="exists; remove it"):
        encode_lib.encode(request(pipeline, prompts, out, batch_size=3))
    assert len(encode_lib.encode(request(pipeline, prompts, out))) == 6
    assert not partial.exists()
    with pytest.raises(FileExistsError, match="exists; remove it"):
        encode_lib.encode(request(pipeline, prompts, out))
    assert (out / "embeddings.array_record").read_bytes() == before


def test_settings_may_change_before_the_first_batch(pipeline, prompts, tmp_path, monkeypatch):
    """As after the first batch did not fit into memory."""

    def too_large(self, prompts):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(qwen.PromptEncoder, "__call__", too_large)
        with pytest.raises(RuntimeError, match="out of memory"):
            encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", batch_size=6))
    assert (tmp_path / "cache.partial").exists()
    encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", batch_size=2))
    encode_lib.encode(request(pipeline, prompts, tmp_path / "whole", batch_size=2))
    caches = [EmbeddingCache(tmp_path / name) for name in ("cache", "whole")]
    assert caches[0].manifest == caches[1].manifest


def test_starting_over(pipeline, prompts, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_lib, "_assemble", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", batch_size=3))
    again = request(pipeline, prompts, tmp_path / "cache", resume=False)
    assert len(encode_lib.encode(again)) == 6


def test_a_folder_of_somebody_else_is_not_touched(pipeline, prompts, tmp_path):
    (tmp_path / "cache.partial").mkdir()
    (tmp_path / "cache.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"cache.partial .* holds something else"):
        encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", resume=False))
    assert (tmp_path / "cache.partial" / "thesis.txt").exists()
    # Not with a file that is called like ours either.
    (tmp_path / "cache.partial" / "settings.json").write_text('{"theme": "dark"}')
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"has settings\.json already, which this program"):
            encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", resume=resume))
    assert (tmp_path / "cache.partial" / "settings.json").read_text() == '{"theme": "dark"}'


@pytest.mark.parametrize("resume", [True, False])
def test_what_somebody_puts_beside_the_work_stays(pipeline, prompts, tmp_path, monkeypatch, resume):
    partial = tmp_path / "cache.partial"

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_lib, "_assemble", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode_lib.encode(request(pipeline, prompts, tmp_path / "cache"))
    (partial / "thesis.txt").write_text("years of work")
    encode_lib.encode(request(pipeline, prompts, tmp_path / "cache", resume=resume))
    assert (partial / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in partial.iterdir()) == [manifest.FILE, "thesis.txt"]


def test_bad_input_is_one_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog\n")
    flags = [f"--prompts={file}", "--text_encoder=none", f"--out={tmp_path / 'cache'}"]
    found = run("-m", "sage_grpo_jax.encode_prompts", *flags)
    assert found.returncode == 2
    assert found.stderr == f"error: {file}, line 2: the prompt is empty\n"


def test_without_torch(tmp_path):
    hide = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; "
    start = hide + "from sage_grpo_jax import encode_prompts as e; "
    command = start + "e.command_line.run(e.main)"
    shown = run("-c", command, "--helpfull")
    assert "--text_encoder" in shown.stdout
    (tmp_path / "p.txt").write_text("a cat\n")
    flags = [f"--prompts={tmp_path / 'p.txt'}", "--text_encoder=x", f"--out={tmp_path / 'c'}"]
    found = run("-c", command, *flags)
    assert found.returncode == 2
    assert found.stderr.splitlines() == [
        "error: torch is not installed; the encoders need: pip install sage_grpo_jax[text]"
    ]
