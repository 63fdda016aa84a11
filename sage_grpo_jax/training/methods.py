"""Method presets: what tells one published method from another, as overrides of a recipe.

A preset sets the sampler, the loss and the trust region; sizes, prompts and the optimizer stay with
the recipe. `docs/math.md` has the equations.
"""

from typing import Any

import ml_collections

METHODS: dict[str, dict[str, Any]] = {
    # SAGE-GRPO: precise SDE, equalized timesteps, moving anchor plus previous policy.
    "sage": {
        "rollout.sde": "precise",
        "loss.equalizer": True,
        "loss.log_prob": "gaussian",
        "trust_region.kind": "dual",
    },
    # Flow-GRPO (arXiv 2505.05470): its SDE, a fixed reference.
    "flow_grpo": {
        "rollout.sde": "flow",
        "loss.equalizer": False,
        "loss.log_prob": "gaussian",
        "trust_region.kind": "fixed",
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
    config.method = method
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
