"""Encodes a file of prompts into an embedding cache, one encoder at a time."""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from sage_grpo_jax.common.progress import Progress
from sage_grpo_jax.data import prompts as prompts_lib
from sage_grpo_jax.data.embedding_cache import EmbeddingCache, EmbeddingCacheWriter, Encoder
from sage_grpo_jax.text_encoders import (
    byt5,
    first_frame,
    model_folders,
    registry,
    template,
    torch_support,
)
from sage_grpo_jax.text_encoders.kind import Tokenizer
from sage_grpo_jax.text_encoders.work import SETTINGS, Stage, WorkFolder, read_settings, run

Encode = Callable[[Sequence[Any]], list[np.ndarray]]
_IMAGE_TO_VIDEO = ("image_encoder", "vae", "height", "width")
_COMPANIONS = ("byt5", *_IMAGE_TO_VIDEO)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to encode and with what; the fields are the flags of `encode_prompts`."""

    prompts: str
    text_encoder: str
    out: str
    byt5: str | None = None
    image_encoder: str | None = None
    vae: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "bfloat16"
    negative_prompt: str = ""
    resume: bool = True


def encode(request: Request) -> EmbeddingCache:
    """Writes the cache of a request, and opens it.

    A request that was killed goes on where it was, from OUT.partial; a finished one is not done
    again if nothing but that folder was left to remove.

    Raises:
      FileNotFoundError, ValueError: bad input, before any network is loaded; naming the field.
      FileExistsError: OUT exists.
      ModuleNotFoundError: without torch or transformers.
    """
    # Whatever can be refused is refused here, before hours of encoding.
    out = pathlib.Path(request.out)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not (partial / SETTINGS).exists():
        raise FileExistsError(f"out={out}: exists; remove it or choose another name")
    _check_values(request)
    plan = Plan(request)

    # A kill between publishing and clearing up leaves both folders.
    if out.exists():
        return _finished_before(out, partial, plan)

    # One encoder at a time; what each of them gives lies in the work folder.
    work = WorkFolder(partial, plan.settings, request.resume)
    found = {stage.name: run(stage, work, request.batch_size) for stage in plan.stages}

    # The work is removed last: until the cache is there, it is all that there is.
    _assemble(plan, work, found, out)
    _clear_up(work)
    return EmbeddingCache(out)


def _clear_up(work: WorkFolder) -> None:
    if left := work.remove():
        _note(f"{work.path} stays: it holds {', '.join(left[:3])}, which is not ours")


def _finished_before(out: pathlib.Path, partial: pathlib.Path, plan: "Plan") -> EmbeddingCache:
    """A run that was killed after it published the cache and before it removed its work."""
    # The cache of another request is not the answer to this one.
    if read_settings(partial) != WorkFolder.comparable(plan.settings):
        raise FileExistsError(f"out={out}: exists; remove it or choose another name")
    cache = EmbeddingCache(out)
    _clear_up(WorkFolder(partial, plan.settings, resume=True))
    return cache


def _check_values(request: Request) -> None:
    if request.batch_size < 1:
        raise ValueError(f"batch_size={request.batch_size}: must be at least 1")
    for field, allowed in (("dtype", torch_support.DTYPES), ("device", torch_support.DEVICES)):
        if getattr(request, field) not in allowed:
            raise ValueError(
                f"{field}={getattr(request, field)}: must be one of {', '.join(allowed)}"
            )

    # All of image-to-video, or nothing of it.
    given = {field: getattr(request, field) is not None for field in _IMAGE_TO_VIDEO}
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(field for field, there in given.items() if not there)
        raise ValueError(
            f"{missing}: not set; image-to-video needs image_encoder, vae, height and width, "
            "text-to-video none of them"
        )


class Plan:
    """A request that was looked through: all that can be checked before a network is loaded.

    Attributes:
      prompts: of the file. Their positions name them in the stages; the negative prompt's is the
        one after the last.
      stages: what is left to encoders.
      encoder, details: go into the manifest.
      settings: all that the cache's bytes depend on.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.prompts = prompts_lib.read_prompts(request.prompts)
        self.device = torch_support.choose_device(request.device)
        self.stages: list[Stage] = []
        self.details: dict[str, Any] = {
            "compute_dtype": request.dtype,
            "device": self.device,
            "negative_prompt": request.negative_prompt,
        }

        # The kind of text encoder decides which other encoders go with it.
        self._models: dict[str, str] = {}
        folders = model_folders.find_text_encoder(request.text_encoder)
        self.kind = registry.choose(folders.model)
        registry.check_companions(
            self.kind, [flag for flag in _COMPANIONS if getattr(request, flag) is not None]
        )

        # Stages: the prompts, the texts that they quote, the first frames.
        versions, image_hashes = torch_support.versions(self.kind.libraries), []
        template_hash = self._add_text(folders)
        if "byt5" in self.kind.companions:
            self._add_byt5()
        if request.vae is not None:
            versions["jax"] = jax.__version__
            image_hashes = self._add_images(request.height, request.width)
        elif any(prompt.image is not None for prompt in self.prompts):
            unset = "--image_encoder and --vae are not set"
            why = unset if "vae" in self.kind.companions else f"{self.kind.name} goes with none"
            _note(f"the prompts' images are left out: {why}")

        # What the bytes of the cache depend on: unfinished work of other settings is not continued.
        self.encoder = Encoder(self.kind.name, template_hash, versions, self._models)
        self.settings = {
            "prompts": _digest([(prompt.id, prompt.text) for prompt in self.prompts]),
            "images": _digest(image_hashes),
            "batch_size": request.batch_size,
            "encoder": dataclasses.asdict(self.encoder),
            **self.details,
        }

    def _add_text(self, folders: model_folders.ModelFolders) -> str:
        """Adds the text encoder's stage; returns the hash of the template."""
        # Who embeds, in the manifest of the cache.
        self._models["text_encoder"] = model_folders.fingerprint(folders.model)
        self._models["tokenizer"] = model_folders.processor_fingerprint(folders.processor)
        tokenizer: Tokenizer = self.kind.open_tokenizer(folders.processor)

        # The negative prompt comes last. What is too long loses its end, and not silently.
        texts = [prompt.text for prompt in self.prompts]
        tokens = tokenizer([*texts, self.request.negative_prompt])
        truncated = sum(prompt.truncated for prompt in tokens)
        if truncated:
            _note(f"prompts over {self.kind.max_tokens} tokens, whose ends are cut: {truncated}")
        self.details |= {**tokenizer.details, "truncated": truncated}

        # The network is opened by the stage, and only if batches are left to do.
        self.stages.append(
            Stage(
                "text",
                "tokens of prompts",
                inputs=dict(enumerate(tokens)),
                cost=lambda prompt: len(prompt.ids),
                open=lambda: self.kind.open_encoder(
                    folders.model, self.request.dtype, self.device, tokenizer
                ),
                dtype=self.request.dtype,
            )
        )
        return tokenizer.template_hash

    def _add_byt5(self) -> None:
        # Most prompts quote nothing and have no place in this stage.
        texts = [*(prompt.text for prompt in self.prompts), self.request.negative_prompt]
        glyphs = {
            position: glyph
            for position, text in enumerate(texts)
            if (glyph := template.glyph_text(text)) is not None
        }
        if self.request.byt5 is None:
            if glyphs:
                _note(f"prompts that quote text, read without --byt5: {len(glyphs)}")
            return

        # Named in the manifest even where no prompt needs it: it belongs to the settings.
        folders = model_folders.find_byt5(self.request.byt5)
        self._models["text_encoder_2"] = model_folders.fingerprint(folders.model)
        self._models["tokenizer_2"] = model_folders.processor_fingerprint(folders.processor)
        self.details["byt5_max_tokens"] = byt5.MAX_TOKENS

        tokenizer = byt5.GlyphTokenizer(folders.processor)
        if glyphs:
            self.stages.append(
                Stage(
                    "byt5",
                    "tokens of quoted text",
                    inputs=dict(zip(glyphs, tokenizer(list(glyphs.values())), strict=True)),
                    cost=len,
                    open=lambda: byt5.GlyphEncoder(folders.model, self.device, tokenizer.pad),
                    dtype=self.request.dtype,
                )
            )

    def _add_images(self, height: int, width: int) -> list[str]:
        """Adds the stages of the vision model and the VAE; returns the hashes of the images."""
        # Who encodes, and at which size.
        folders = model_folders.find_image_encoder(self.request.image_encoder)
        vae_folder = model_folders.find_vae(self.request.vae)
        first_frame.check_size(vae_folder, height, width)
        self._models["image_encoder"] = model_folders.fingerprint(folders.model)
        self._models["feature_extractor"] = model_folders.processor_fingerprint(folders.processor)
        self._models["vae"] = model_folders.fingerprint(vae_folder)
        self.details |= {"height": height, "width": width}

        # Every image is opened once now, since a broken one would stop the work much later.
        hashes = []
        with Progress(len(self.prompts), "images looked through") as progress:
            for prompt in self.prompts:
                hashes.append(_check_image(prompt))
                progress.update()

        # Two stages read the same files: features, and latents of the frame.
        def open_image(path: pathlib.Path) -> Image.Image:
            return first_frame.fit_image(first_frame.open_image(path), height, width)

        def open_features() -> Encode:
            encoder = first_frame.ImageEncoder(*folders, self.request.dtype, self.device)
            return lambda paths: encoder([open_image(path) for path in paths])

        def open_latents() -> Encode:
            encoder = first_frame.open_latent_encoder(vae_folder)
            return lambda paths: [encoder(open_image(path)) for path in paths]

        for name, unit, opener, dtype in (
            ("image", "images (features)", open_features, self.request.dtype),
            ("image_latents", "images (latents)", open_latents, "float32"),
        ):
            # Every image costs the same; the negative prompt has none.
            inputs = {position: prompt.image for position, prompt in enumerate(self.prompts)}
            self.stages.append(Stage(name, unit, inputs, lambda _: 1, opener, dtype))
        return hashes


def _check_image(prompt: prompts_lib.Prompt) -> str:
    """The hash of a prompt's image, which is decoded here: not first after hours of encoding."""
    if prompt.image is None:
        raise ValueError(f"prompt {prompt.id!r} has no image; image-to-video needs one each")
    first_frame.open_image(prompt.image)
    return hashlib.sha256(prompt.image.read_bytes()).hexdigest()


def _assemble(
    plan: Plan, work: WorkFolder, found: dict[str, dict[int, int]], path: pathlib.Path
) -> None:
    """Writes the cache in the order of the prompts from the finished batches."""
    dtypes = {stage.name: stage.dtype for stage in plan.stages}

    def arrays(position: int) -> dict[str, np.ndarray]:
        return {
            name: work.read(name, batches[position], position, dtypes[name])
            for name, batches in found.items()
            if position in batches
        }

    # Batches were made by cost; the cache has the order of the file.
    with EmbeddingCacheWriter(path, plan.encoder, plan.request.dtype, plan.details) as writer:
        for position, prompt in enumerate(plan.prompts):
            writer.add(prompt, **arrays(position))
        writer.set_negative(**arrays(len(plan.prompts)))


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(repr(list(values)).encode()).hexdigest()


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
