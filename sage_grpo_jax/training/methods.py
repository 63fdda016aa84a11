"""Method presets: what tells one published method from another, as overrides of a recipe.

A preset sets the sampler, the loss and the trust region; sizes, prompts and the optimizer stay with
the recipe. `docs/methods.md` explains each line.
"""

from typing import Any

import ml_collections

# The trust region as the official code has it; warm-up, range and direction of the feedback are
# those of the paper's Eq. 41 and 42 as printed.
_AS_PRINTED = {
    "trust_region.kind": "dual",
    "trust_region.anchor_every": 10,
    "trust_region.anchor_weight": 1.0,
    "trust_region.previous_weight": 0.1,
    "trust_region.previous_estimator": "log_ratio",
    "trust_region.initial_weight": 1e-7,
    "trust_region.final_weight": 1e-5,
    "trust_region.warmup_steps": 100,
    "trust_region.min_weight": 1e-7,
    "trust_region.max_weight": 1e-5,
    "trust_region.target_shift": 2e-5**0.5,  # a KL of 1e-5: there the target is the last weight
    "trust_region.feedback": "paper",
}

METHODS: dict[str, dict[str, Any]] = {
    # SAGE-GRPO with what this project corrects: precise SDE, equalized timesteps, clean last step,
    # moving anchor plus previous policy in closed form, feedback that tightens.
    "sage": {
        "rollout.sde": "precise",
        "loss.equalizer": True,
        "loss.log_prob": "gaussian",
        "trust_region.kind": "dual",
        # Calibrated on the moving shapes, docs/methods.md: no brake on a run whose policy moves
        # less than target_shift in an anchor's life, and one that holds where it moves more.
        "trust_region.initial_weight": 0.01,
        "trust_region.final_weight": 0.1,
        "trust_region.warmup_steps": 20,
        "trust_region.min_weight": 1e-3,
        "trust_region.max_weight": 30.0,
        "trust_region.target_shift": 0.02,
    },
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
        "optimizer.name": "muon",
        "optimizer.momentum": 0.95,
        "optimizer.b1": 0.95,
        "optimizer.b2": 0.95,
        "optimizer.weight_decay": 0.01,
        **_AS_PRINTED,
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
    # Flow-GRPO (arXiv 2505.05470): its SDE, a fixed reference.
    "flow_grpo": {
        "rollout.sde": "flow",
        "loss.equalizer": False,
        "loss.log_prob": "gaussian",
        "trust_region.kind": "fixed",
        # A constant weight, as its authors have it for long runs.
        "trust_region.initial_weight": 0.04,
        "trust_region.final_weight": 0.04,
        "trust_region.warmup_steps": 0,
        "trust_region.feedback": "none",
    },
    # DanceGRPO (arXiv 2505.07818): its SDE, no KL term.
    "dance_grpo": {
        "rollout.sde": "dance",
        "loss.equalizer": False,
        "loss.log_prob": "gaussian",
        "trust_region.kind": "none",
    },
    # Flow-CPS (arXiv 2509.05952): coefficient-preserving sampling, -(x' - μ)² as log-probability,
    # and the time weight that belongs to it.
    "cps": {
        "rollout.sde": "cps",
        "loss.equalizer": True,
        "loss.log_prob": "squared",
        "trust_region.kind": "none",
    },
}


def apply(config: ml_collections.ConfigDict, method: str) -> None:
    """Applies a preset to a recipe, in place.

    Raises:
      ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; allowed: {', '.join(METHODS)}")
    config.update(method=method, applied_method=method)
    config.update_from_flattened_dict(METHODS[method])


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
