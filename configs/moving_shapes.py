"""SAGE-GRPO on the moving-shapes world: minutes on two CPU cores.

    python -m sage_grpo_jax.train --config=configs/moving_shapes.py:method=sage --workdir=runs/a

Argument: method = a preset of docs/methods.md, sage by default. The networks are those of
HunyuanVideo-1.5 at a small width, pretrained by configs/moving_shapes_pretrain.py.
"""

import ml_collections

from sage_grpo_jax.config import methods, schema


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The recipe of the quick start."""
    config = schema.default_config()
    config.name = "moving_shapes"
    config.num_steps = 90

    # Networks, clips and prompts. So small a network needs no remat, and no scan over blocks.
    config.model.transformer = "asset:moving_shapes/transformer"
    config.model.vae = "asset:moving_shapes/vae"
    config.model.update(remat=False, unroll=True)
    config.video.update(frames=17, height=32, width=32, fps=8.0)
    config.data.train_prompts = "moving_shapes:train"
    config.data.eval_prompts = "moving_shapes:validation"
    config.data.test_prompts = "moving_shapes:test"

    # Rollout and update
    config.rollout.update(num_steps=10, shift=3.0, eta=0.8, prompts_per_step=8, group_size=8)
    config.rollout.decode_batch = 4  # small pieces stay in the caches of a CPU
    config.loss.micro_batch = 64
    config.mesh.update(data=-1, fsdp=1)  # so small a network fits on every device
    config.optimizer.learning_rate = 5e-5
    config.lora.learning_rate = 4e-4  # adapters move the weights less than they move themselves
    config.rewards.update(backend="moving_shapes", budget_seconds=120.0)
    config.rewards.weights.update(VQ=1.0, MQ=1.0, TA=1.0)  # setting A of the paper

    config.eval.update(every=0, num_steps=20, manifold_distance=True, shape_identity=True)
    config.eval.update(num_prompts=32, num_test_prompts=64, samples_per_prompt=2)
    config.checkpoint.update(every=20, keep=2)

    method = methods.parse_arg(arg, method="sage")["method"]
    methods.apply(config, method)
    if method == "sage" or method.endswith("_matched"):
        # What tells the clips of a group apart is then the noise that is trained on alone.
        config.rollout.same_initial_noise = True
    return config
