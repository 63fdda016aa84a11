"""Wan 2.1 text-to-video, 1.3 or 14 billion parameters.

    --config=configs/wan_21.py:variant=1.3B,method=sage,lora=64

Arguments (each may be left out):
    variant  1.3B or 14B (1.3B)
    method   a preset of docs/methods.md (sage)
    lora     rank of the adapters; 0: full fine-tuning (0)
    size     HEIGHTxWIDTH of a clip, multiples of 16 (480x832)
    frames   1 + a multiple of 4 (81)

The 1.3 B model fits one machine: a v5e-8 or v6e-4 slice, or one large GPU.

Weights: docs/weights.md. Prompts: docs/embeddings.md. Every field can be overridden by flags.
"""

import ml_collections

from sage_grpo_jax.config import methods, schema

# Released model -> shift: what diffusers advises for 480p, and the official default for the rest.
SHIFTS = {"1.3B": 3.0, "14B": 5.0}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe of a released model."""
    args = methods.parse_arg(
        arg, variant="1.3B", method="sage", lora="0", size="480x832", frames="81"
    )
    variant = args["variant"]
    if variant not in SHIFTS:
        raise ValueError(f"variant: got {variant!r}; allowed: {', '.join(SHIFTS)}")

    config = schema.default_config()
    config.name = f"wan_21_{variant}"
    config.num_steps = 300

    # Networks and clips. The VAE codes a clip in pieces of time: it needs no tiles.
    folder = f"weights/wan_21/{variant}"
    config.model.update(variant=f"wan_21_t2v_{variant}")
    config.model.update(transformer=f"{folder}/transformer", vae=f"{folder}/vae")
    config.model.update(compute_dtype="bfloat16", remat=True, vae_tiling="off")
    height, width = _size(args["size"])
    config.video.update(frames=_integer("frames", args["frames"]), height=height, width=width)
    config.video.fps = 16.0
    config.data.update(text_encoder="cache", max_text_tokens=0)
    config.data.update(train_prompts="cache:prompts/train", eval_prompts="cache:prompts/eval")

    # Rollout and update. One sample is in flight on each of 8 devices; fewer take more of it or a
    # smaller micro_batch.
    config.rollout.update(num_steps=20, shift=SHIFTS[variant], eta=0.5, guidance=5.0)
    config.rollout.update(prompts_per_step=16, group_size=4, decode_batch=1)
    config.loss.micro_batch = 8
    config.optimizer.update(learning_rate=1e-5, weight_decay=0.01)
    config.lora.update(rank=_integer("lora", args["lora"]), learning_rate=1e-4)

    # A sidecar with the reward model, see serve_rewards.
    config.rewards.update(backend="video_align", spawn=False, address="localhost:6789")
    config.rewards.update(timeout_seconds=300.0, budget_seconds=3600.0)
    config.rewards.weights.update(VQ=0.5, MQ=0.5, TA=1.0)

    config.eval.update(every=50, num_prompts=32, num_steps=50)
    config.checkpoint.update(every=5, keep=3)

    # The network computes in bfloat16: references in float32 would be rounded where they are used.
    config.trust_region.reference_dtype = "bfloat16"
    methods.apply(config, args["method"])
    return config


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"size: got {text!r}; allowed: HEIGHTxWIDTH, as in 480x832")
    return int(height), int(width)


def _integer(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{name}: got {text!r}; allowed: a whole number")
    return int(text)
