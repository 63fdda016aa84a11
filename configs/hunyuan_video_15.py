"""HunyuanVideo-1.5, 8.3 billion parameters, on a TPU slice or a GPU node.

    --config=configs/hunyuan_video_15.py:variant=480p_t2v,method=sage,lora=64

Arguments (each may be left out):
    variant  a released checkpoint, see `VARIANTS` (480p_t2v)
    method   a preset of docs/methods.md (sage)
    lora     rank of the adapters; 0: full fine-tuning (0)
    size     HEIGHTxWIDTH of a clip, multiples of 16 (352x624 for 480p, 720x1280 for 720p)
    frames   1 + a multiple of 4 (81)

Weights: docs/weights.md. Prompts: docs/embeddings.md. Every field can be overridden by flags.
"""

import ml_collections

from sage_grpo_jax.config import methods, schema

# Released variant -> (guidance, shift, sampling steps), as its authors recommend.
VARIANTS = {
    "480p_t2v": (6.0, 5.0, 50),
    "480p_i2v": (6.0, 5.0, 50),
    "720p_t2v": (6.0, 9.0, 50),
    "720p_i2v": (6.0, 7.0, 50),
    "480p_t2v_distilled": (1.0, 5.0, 50),
    "480p_i2v_distilled": (1.0, 5.0, 50),
    "480p_i2v_step_distilled": (1.0, 7.0, 12),
    "720p_t2v_distilled": (1.0, 9.0, 50),
    "720p_i2v_distilled": (1.0, 7.0, 50),
}
# The sizes that samples are taken at in training: the smallest 16:9 bucket of the resolution.
SIZES = {"480p": "352x624", "720p": "720x1280"}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe of a released variant."""
    args = methods.parse_arg(arg, variant="480p_t2v", method="sage", lora="0", size="", frames="81")
    variant = args["variant"]
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}; allowed: {', '.join(VARIANTS)}")
    guidance, shift, sampling_steps = VARIANTS[variant]

    config = schema.default_config()
    config.name = f"hunyuan_video_15_{variant}"
    config.num_steps = 300

    # Networks, clips and prompts
    folder = f"weights/hunyuan_video_15/{variant}"
    config.model.update(variant=variant, transformer=f"{folder}/transformer", vae=f"{folder}/vae")
    config.model.update(compute_dtype="bfloat16", remat=True, vae_tiling="official")
    height, width = _size(args["size"] or SIZES[variant[:4]])
    config.video.update(frames=_integer("frames", args["frames"]), height=height, width=width)
    config.video.fps = 24.0
    config.data.update(text_encoder="cache", max_text_tokens=0)
    config.data.update(train_prompts="cache:prompts/train", eval_prompts="cache:prompts/eval")

    # Rollout and update, in the sizes of the official recipe
    config.rollout.update(num_steps=20, shift=shift, eta=0.5, guidance=guidance)
    config.rollout.update(prompts_per_step=16, group_size=4, decode_batch=1)
    # One sample, with both branches of guidance, in flight on each of 16 devices. More devices
    # share a sample (mesh.context=4 on 64), fewer take more of it or a smaller micro_batch.
    config.loss.micro_batch = 16
    config.optimizer.update(learning_rate=1e-5, weight_decay=0.01)
    # The network computes in bfloat16: references in float32 would be rounded where they are used.
    config.trust_region.reference_dtype = "bfloat16"

    # A sidecar with the reward model, see serve_rewards.
    config.rewards.update(backend="video_align", spawn=False, address="localhost:6789")
    config.rewards.update(timeout_seconds=300.0, budget_seconds=3600.0)
    # Setting B of the paper, its headline. Setting A: --config.rewards.weights.{VQ,MQ}=1.
    config.rewards.weights.update(VQ=0.5, MQ=0.5, TA=1.0)

    config.eval.update(every=50, num_prompts=32, num_steps=sampling_steps)
    config.checkpoint.update(every=5, keep=3)
    config.lora.update(rank=_integer("lora", args["lora"]), learning_rate=1e-4)

    methods.apply(config, args["method"])
    return config


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"size: got {text!r}; allowed: HEIGHTxWIDTH, as in 352x624")
    return int(height), int(width)


def _integer(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{name}: got {text!r}; allowed: a whole number")
    return int(text)
