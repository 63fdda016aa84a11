"""Which recipes the float64 shadow takes; the formulas themselves: shadow_test."""

import dataclasses
import types

import pytest

from sage_grpo_jax.checks import shadow, shadow_formulas
from sage_grpo_jax.config import schema
from sage_grpo_jax.flow import sde, windows
from sage_grpo_jax.grpo import equalizer, loss, trust_region

CHOICES = {
    "rollout.sde": sde.KINDS,
    "rollout.window": windows.WINDOWS,
    "rollout.trained_choice": windows.TRAINED_CHOICES,
    "rollout.last_step": sde.LAST_STEPS,
    "loss.objective": (*loss.OBJECTIVES, "nft"),
    "loss.median": equalizer.MEDIANS,
    "loss.log_prob": sde.LOG_PROBS,
    "loss.log_prob_reduction": sde.REDUCTIONS,
    "loss.step_reduction": ("mean", "sum"),
    "trust_region.kind": trust_region.KINDS,
    "trust_region.feedback": trust_region.FEEDBACKS,
    "trust_region.previous_estimator": trust_region.ESTIMATORS,
    "trust_region.kl_time_weight": trust_region.TIME_WEIGHTS,
}
# Neither has a transition with a density.
WITHOUT_FORMULA = {("rollout.sde", "ode"), ("loss.objective", "nft")}


def config_with(path: str, value: str) -> schema.Config:
    """The default recipe with one other choice, valid or not."""
    config, (group, name) = schema.Config(), path.split(".")
    changed = types.SimpleNamespace(**vars(getattr(config, group)) | {name: value})
    return dataclasses.replace(config, **{group: changed})


@pytest.mark.parametrize("path", CHOICES)
def test_every_choice_has_a_formula_or_is_refused(path):
    for value in CHOICES[path]:
        if (path, value) in WITHOUT_FORMULA:
            with pytest.raises(ValueError, match=rf"^config.debug.shadow: .* {path}='{value}', "):
                shadow_formulas.check(config_with(path, value))
        else:
            shadow_formulas.check(config_with(path, value))


@pytest.mark.parametrize("path", CHOICES)
def test_a_choice_that_is_yet_to_come_is_refused(path):
    with pytest.raises(ValueError, match=rf"True with {path}='new', .* allowed: .*, or False$"):
        shadow_formulas.check(config_with(path, "new"))


def test_the_shadow_asks_before_it_starts():
    plan = types.SimpleNamespace(config=config_with("rollout.sde", "new"))
    with pytest.raises(ValueError, match=r"^config.debug.shadow: got True with rollout.sde='new'"):
        shadow.Shadow(plan)
    with pytest.raises(ValueError, match=r"kind='new': must be one of precise, flow, dance, cps"):
        shadow_formulas.transition("new", 0.5, 0.5, 0.9, 0.8, 0.5)
