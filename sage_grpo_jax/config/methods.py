"""Method presets: what tells one published method from another, as overrides of a recipe.

The baselines are those of their authors' code, as far as a field can say it; `docs/methods.md` has
the source of every line and what a field cannot say. `NAME_matched` is `sage` with another sampler
and nothing else. Sizes (steps, shift, group, prompts), the learning rate and the scale of guidance
stay with the recipe, unless they are what a method is about.
"""

import math
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

# λ of the paper's Eq. 41 and 42 as printed.
_AS_PRINTED = {
    "trust_region.kind": "dual",
    "trust_region.anchor_every": 10,
    "trust_region.anchor_weight": 1.0,
    "trust_region.previous_weight": 0.1,
    "trust_region.previous_estimator": "log_ratio",
    "trust_region.initial_weight": 1e-7,
    "trust_region.final_weight": 1e-5,
    "trust_region.warmup_steps": 100.0,
    "trust_region.min_weight": 1e-7,
    "trust_region.max_weight": 1e-5,
    "trust_region.target_shift": 2e-5**0.5,  # a KL of 1e-5: there the target is the last weight
    "trust_region.feedback": "paper",
}
# Micro-steps in one optimizer step of the official recipe: 2 samples of a rank at 20 steps. Its
# controller is updated at each of them.
_MICRO_STEPS = 40

# AdamW of the baselines.
_ADAMW = {
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 1e-4,
    "optimizer.grad_clip": 1.0,
}
# What Flow-GRPO, Flow-CPS and DanceGRPO have in common.
_CLIPPED_RATIOS = {
    "loss.objective": "ppo",
    "loss.clip_range": 1e-4,
    "loss.equalizer": False,
    "loss.step_reduction": "mean",
    "advantage.clip": 5.0,
    "loss.updates_per_rollout": 2,
    "loss.split_updates": True,
}
# Flow-GRPO's average, in all that comes from its code.
_EMA = {"ema.decay": 0.9, "eval.weights": "ema"}

_SAGE = {
    "rollout.sde": "precise",
    "loss.equalizer": True,
    "loss.log_prob": "gaussian",
    "trust_region.kind": "dual",
    # Calibrated on the moving shapes, docs/methods.md: no brake on a run whose policy moves
    # less than target_shift in an anchor's life, and one that holds where it moves more.
    "trust_region.initial_weight": 0.01,
    "trust_region.final_weight": 0.1,
    "trust_region.warmup_steps": 20.0,
    "trust_region.min_weight": 1e-3,
    "trust_region.max_weight": 30.0,
    "trust_region.target_shift": 0.02,
}

METHODS: dict[str, dict[str, Any]] = {
    # SAGE-GRPO with what this project corrects: precise SDE, equalized timesteps, clean last step,
    # moving anchor plus previous policy in closed form, feedback that tightens.
    "sage": _SAGE,
    # What the authors' PyTorch code does.
    "sage_official": {
        "rollout.sde": "precise",
        "rollout.last_step": "stochastic",
        "loss.objective": "ppo",
        "loss.clip_range": 1e-4,
        "loss.equalizer": True,
        "loss.median": "lower",
        "loss.log_prob": "gaussian",
        "loss.step_reduction": "mean",
        "advantage.epsilon": 0.0,
        "advantage.std_floor": 1e-6,
        "advantage.clip": 5.0,
        "rewards.weights.VQ": 0.5,
        "rewards.weights.MQ": 0.5,
        "rewards.weights.TA": 1.0,
        "optimizer.name": "muon",
        "optimizer.momentum": 0.95,
        "optimizer.b1": 0.95,
        "optimizer.b2": 0.95,
        "optimizer.weight_decay": 0.01,
        "optimizer.grad_clip": 1.0,
        **_AS_PRINTED,
        "trust_region.warmup_steps": 100.0 / _MICRO_STEPS,
        "trust_region.history": 1,  # its ten micro-steps are a quarter of an update
        "trust_region.up": 1.1**_MICRO_STEPS,
        "trust_region.down": 0.9**_MICRO_STEPS,
    },
    # What the paper prints (Eq. 43: REINFORCE, summed over steps), with the score that is one and
    # the sign that minimises the KL.
    "sage_paper": {
        "rollout.sde": "precise",
        "rollout.last_step": "stochastic",
        "loss.objective": "reinforce",
        "loss.equalizer": True,
        "loss.median": "mean",
        "loss.log_prob": "gaussian",
        "loss.step_reduction": "sum",
        **_AS_PRINTED,
    },
    # Flow-GRPO (arXiv 2505.05470), config/grpo.py:general_ocr_sd3 of its repository.
    "flow_grpo": {
        **_CLIPPED_RATIOS,
        **_ADAMW,
        **_EMA,
        "ema.every": 8,
        "rollout.sde": "flow",
        "rollout.eta": 0.7,
        "rollout.last_step": "stochastic",  # noisy and decoded, but not trained
        "rollout.same_initial_noise": False,
        "rollout.trained_fraction": 0.99,
        "rollout.trained_choice": "first",
        "loss.log_prob": "gaussian",
        "loss.guidance_gradient": "condition",
        "advantage.std": "global",
        "advantage.epsilon": 1e-4,
        "trust_region.kind": "fixed",
        "trust_region.fixed_weight": 0.04,
        "trust_region.kl_time_weight": "step_length",
    },
    # DanceGRPO (arXiv 2505.07818), its GRPO script in scripts/finetune/ of its repository.
    "dance_grpo": {
        **_CLIPPED_RATIOS,
        **_ADAMW,
        "rollout.sde": "dance",
        "rollout.eta": 0.25,
        "rollout.last_step": "deterministic",
        "rollout.same_initial_noise": True,
        "rollout.trained_fraction": 0.6,
        "rollout.trained_choice": "random",
        "loss.log_prob": "gaussian",
        "advantage.std": "group_unbiased",
        "advantage.combine": "per_reward",
        "advantage.epsilon": 1e-8,
        "trust_region.kind": "none",
    },
    # Flow-CPS (arXiv 2509.05952), config/grpo.py:pickscore_flux of its repository.
    "cps": {
        **_CLIPPED_RATIOS,
        **_ADAMW,
        **_EMA,
        "ema.every": 8,
        "rollout.sde": "cps",
        "rollout.eta": 0.9,
        "rollout.same_initial_noise": False,
        "loss.log_prob": "squared",
        "advantage.std": "global",
        "advantage.epsilon": 1e-4,
        "trust_region.kind": "none",
    },
    # DiffusionNFT (arXiv 2509.16117), config/nft.py:sd3_pickscore of its repository.
    "diffusion_nft": {
        **_ADAMW,
        **_EMA,
        "ema.every": 1,
        "rollout.sde": "ode",
        "rollout.same_initial_noise": False,  # all that tells the samples of a group apart
        "rollout.guidance": 1.0,
        "rollout.trained_fraction": 0.99,
        "rollout.trained_choice": "random",
        "loss.objective": "nft",
        "loss.equalizer": False,
        "loss.step_reduction": "mean",
        "nft.beta": 1.0,
        "nft.adaptive": True,
        "nft.decay_start": 0,
        "nft.decay_rate": 0.001,
        "nft.decay_limit": 0.5,
        "advantage.std": "global",
        "advantage.epsilon": 1e-4,
        "advantage.clip": 5.0,
        "trust_region.kind": "fixed",
        "trust_region.fixed_weight": 1e-4,
    },
    # The same loop as `sage`: only the sampler differs.
    "flow_grpo_matched": {**_SAGE, "rollout.sde": "flow"},
    "dance_grpo_matched": {**_SAGE, "rollout.sde": "dance"},
    "cps_matched": {**_SAGE, "rollout.sde": "cps"},
}


class Applied(str):
    """The name of a method whose preset is in place, as `apply` leaves it in `config.method`.

    A ConfigDict keeps to the type of a field: no override can change the name by itself, which
    would then say another thing than the values do.
    """


def name_alone(method: str) -> str:
    """What to tell a user who sets `config.method` itself."""
    return (
        f"config.method: got {method!r}, which changes the name and nothing else; allowed: the "
        f"recipe's argument, --config=RECIPE.py:method={method}"
    )


class _NameParser(flags.ArgumentParser):
    """Of the flag --config.method: takes what the recipe has, and no other."""

    def parse(self, argument: str) -> Applied:
        if not isinstance(argument, Applied):
            raise ValueError(name_alone(argument))
        return argument


config_flags.register_flag_parser_for_type(Applied, _NameParser())


def apply(config: ml_collections.ConfigDict, method: str) -> None:
    """Applies a preset to a recipe, in place.

    Weights of rewards that the recipe does not list are left out: which rewards there are is the
    recipe's own choice.

    Where its updates share the samples of a rollout, the recipe's micro-batch is made small enough
    that each gets a whole number of them.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed: {', '.join(METHODS)}")
    config.method = Applied(method)
    config.rewards.weights.lock()  # the recipe may have put others in place
    overrides = dict(METHODS[method])
    for path in METHODS[method]:
        group, _, name = path.rpartition(".")
        if group == "rewards.weights" and name not in config.rewards.weights:
            del overrides[path]

    config.update_from_flattened_dict(overrides)
    if config.loss.split_updates:
        # Whole pieces of the batch take turns in the U updates: U has to divide their number.
        samples = config.rollout.prompts_per_step * config.rollout.group_size
        share = samples // config.loss.updates_per_rollout
        config.loss.micro_batch = math.gcd(config.loss.micro_batch, share)


def parse_arg(arg: str | None, **defaults: str) -> dict[str, str]:
    """The `key=value,key=value` behind the colon of `--config=FILE.py:...`.

    Raises:
      ValueError: a key that the recipe does not know, or no `=`.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, separator, value = item.partition("=")
        if not separator or key not in defaults:
            allowed = ", ".join(f"{k}=..." for k in defaults)
            raise ValueError(f"config argument: got {item!r}; allowed: {allowed}")
        values[key] = value
    return values
