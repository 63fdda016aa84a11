r"""Encodes prompts, once and offline, for training and sampling: writes an embedding cache.

    python -m sage_grpo_jax.encode_prompts --prompts=prompts.jsonl --out=embeddings \
        --text_encoder=PIPELINE --byt5=PIPELINE

Folders are in diffusers' layout: a whole pipeline, or text_encoder/ beside tokenizer/, and so on.
For image-to-video add --image_encoder, --vae, --height and --width; every prompt then needs an
image. A run that was killed goes on where it was when the same command is given again.
Needs PyTorch: pip install sage_grpo_jax[text]. See docs/embeddings.md.
"""

import os

from absl import flags

from sage_grpo_jax.common import command_line

_PROMPTS = flags.DEFINE_string("prompts", None, ".txt, .csv or .jsonl file.", required=True)
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", None, "Folder of Qwen2.5-VL or UMT5, and its tokenizer.", required=True
)
_BYT5 = flags.DEFINE_string("byt5", None, "Folder of Glyph-ByT5 and its tokenizer.")
_IMAGE_ENCODER = flags.DEFINE_string("image_encoder", None, "Folder of SigLIP; image-to-video.")
_VAE = flags.DEFINE_string("vae", None, "Folder of the VAE; image-to-video.")
_HEIGHT = flags.DEFINE_integer("height", None, "Of the clip, in pixels; image-to-video.")
_WIDTH = flags.DEFINE_integer("width", None, "Of the clip, in pixels; image-to-video.")
_OUT = flags.DEFINE_string("out", None, "Folder of the cache; must not exist.", required=True)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts that are encoded at a time.")
_DEVICE = flags.DEFINE_enum(
    "device",
    "auto",
    ["auto", "cpu", "cuda"],
    "Where encoders run; auto: on a GPU if there is one.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32", "float16"],
    "In which text encoder and SigLIP run, and in which embeddings are stored.",
)
_NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "Of the shared negative entry.")
_RESUME = flags.DEFINE_bool("resume", True, "Use what a killed run finished (in OUT.partial).")


def main() -> None:
    """Encodes, and says what was written."""
    # JAX (the VAE) and torch may share a GPU: JAX then must not take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    # Only now: importing it imports JAX, which must find the setting.
    from sage_grpo_jax.text_encoders import encode

    request = encode.Request(
        prompts=_PROMPTS.value,
        text_encoder=_TEXT_ENCODER.value,
        out=_OUT.value,
        byt5=_BYT5.value,
        image_encoder=_IMAGE_ENCODER.value,
        vae=_VAE.value,
        height=_HEIGHT.value,
        width=_WIDTH.value,
        batch_size=_BATCH_SIZE.value,
        device=_DEVICE.value,
        dtype=_DTYPE.value,
        negative_prompt=_NEGATIVE_PROMPT.value,
        resume=_RESUME.value,
    )

    try:
        cache = encode.encode(request)
    except RuntimeError as error:  # torch's and JAX's own kinds
        if "out of memory" not in str(error).lower():
            raise
        raise ValueError(
            f"out of memory; allowed: a --batch_size below {_BATCH_SIZE.value}"
        ) from error
    counts = ", ".join(f"{n} {field}" for field, n in cache.manifest["counts"].items() if n)
    print(f"{cache.path}: {len(cache)} prompts ({counts}), {cache.manifest['dtype']}")


if __name__ == "__main__":
    command_line.run(main)
