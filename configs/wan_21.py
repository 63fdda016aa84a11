"""Wan 2.1 text-to-video, 1.3 or 14 billion parameters.

    --config=configs/wan_21.py:size=1.3b,method=sage

Arguments (each may be left out):
    size    of the model, see `SIZES` (1.3b)
    method  a preset of docs/methods.md (sage)
    lora    rank of the adapters; 0: full fine-tuning (0)
    clip    HEIGHTxWIDTH in pixels, multiples of 16 (480x832)
    frames  1 + a multiple of 4 (81)

Weights: docs/weights.md. Prompts: docs/embeddings.md. Every field can be overridden by flags.
"""

import ml_collections

from sage_grpo_jax.config import methods, schema

# Size of the model -> (released variant, shift of the noise schedule).
SIZES = {"1.3b": ("wan_21_t2v_1.3b", 3.0), "14b": ("wan_21_t2v_14b", 5.0)}
_TEXT_TOKENS = 512  # of every prompt; the rest is empty


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe of a released model."""
    args = methods.parse_arg(arg, size="1.3b", method="sage", lora="0", clip="480x832", frames="81")
    size = args["size"]
    if size not in SIZES:
        raise ValueError(f"size: got {size!r}; allowed: {', '.join(SIZES)}")
    variant, shift = SIZES[size]

    config = schema.default_config()
    config.name = variant
    config.num_steps = 300

    folder = f"weights/{variant}"
    config.model.update(variant=variant, transformer=f"{folder}/transformer", vae=f"{folder}/vae")
    config.model.update(compute_dtype="bfloat16", remat=True)
    height, width = _clip(args["clip"])
    config.video.update(frames=_integer("frames", args["frames"]), height=height, width=width)
    config.video.fps = 16.0
    config.data.update(text_encoder="cache", max_text_tokens=_TEXT_TOKENS)
    config.data.update(train_prompts="cache:prompts/train", eval_prompts="cache:prompts/eval")

    config.rollout.update(num_steps=20, shift=shift, eta=0.5, guidance=5.0)
    config.rollout.update(prompts_per_step=16, group_size=4, decode_batch=1)
    # A sample on each of 8 devices; fewer take more of it or a smaller micro_batch.
    config.loss.micro_batch = 8
    config.optimizer.update(learning_rate=1e-5, weight_decay=0.01)

    # A sidecar with the reward model, see serve_rewards.
    config.rewards.update(backend="video_align", spawn=False, address="localhost:6789")
    config.rewards.update(timeout_seconds=300.0, budget_seconds=3600.0)
    config.rewards.weights.update(VQ=0.5, MQ=0.5, TA=1.0)

    config.eval.update(every=50, num_prompts=32, num_steps=50)
    config.checkpoint.update(every=5, keep=3)
    config.lora.update(rank=_integer("lora", args["lora"]), learning_rate=1e-4)

    methods.apply(config, args["method"])
    return config


def _clip(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"clip: got {text!r}; allowed: HEIGHTxWIDTH, as in 480x832")
    return int(height), int(width)


def _integer(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{name}: got {text!r}; allowed: a whole number")
    return int(text)
