"""The one velocity of a policy: adapters, guidance, ends of steps, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_experts

from sage_grpo_jax.flow import schedules
from sage_grpo_jax.models import lora
from sage_grpo_jax.policy.policy import Guidance, Policy, guided_velocity

CONFIG = two_experts.Config()
SCHEDULE = schedules.make_schedule(4, 3.0)
LATENTS = np.random.default_rng(0).standard_normal((3, 2, 2, 2, 4)).astype(np.float32)
TIMESTEP = np.asarray(SCHEDULE.timesteps)[[0, 2, 3]]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    two_experts.register(monkeypatch)


def draw(tree, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), tree)


def shapes():
    return jax.eval_shape(lambda: two_experts.init_params(CONFIG, jax.random.key(0)))


def condition(seed: int, count: int):
    text = np.random.default_rng(seed).standard_normal((count, 5, CONFIG.text_dim))
    arrays = {"text": text, "text_mask": np.arange(5) <= np.arange(count)[:, None]}
    return two_experts.make_condition(arrays, CONFIG, 2)


def plain(params, prompt):
    return two_experts.velocity(params, LATENTS, TIMESTEP, prompt, CONFIG)


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_guidance_goes_away_from_the_negative_prompt(mode):
    params, prompts, negative = draw(shapes(), 1), condition(2, 3), condition(3, 1)
    velocity = guided_velocity(
        Policy(params), CONFIG, prompts, negative, SCHEDULE, Guidance(3.5, mode)
    )
    away = plain(params, jax.tree.map(lambda x: np.repeat(x, 3, axis=0), negative))
    want = away + 3.5 * (plain(params, prompts) - away)
    np.testing.assert_allclose(velocity(LATENTS, TIMESTEP), want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - plain(params, prompts)).max() > 0.1


def test_without_guidance_no_negative_prompt_is_needed():
    params, prompts = draw(shapes(), 1), condition(2, 3)
    velocity = guided_velocity(Policy(params), CONFIG, prompts, None, SCHEDULE, Guidance())
    np.testing.assert_allclose(velocity(LATENTS, TIMESTEP), plain(params, prompts), rtol=1e-6)
    guided = guided_velocity(Policy(params), CONFIG, prompts, None, SCHEDULE, Guidance(2.0))
    with pytest.raises(ValueError, match="negative condition"):
        guided(LATENTS, TIMESTEP)


def test_adapters_are_added_at_their_scale():
    params = draw(shapes(), 1)
    wanted = lora.LoraConfig(2, 5.0, ("proj", "low/text"))
    adapters = draw(lora.abstract_adapters(shapes(), wanted, two_experts), 4)
    policy = Policy(params, adapters, wanted.scale)
    velocity = guided_velocity(policy, CONFIG, condition(2, 3), None, SCHEDULE, Guidance())
    merged = jax.tree.map(np.copy, params)
    for path in (("high", "blocks", "mix"), ("low", "blocks", "mix"), ("low", "text")):
        ours, theirs = merged, adapters
        for name in path:
            ours, theirs = ours[name], theirs[name]
        ours["kernel"] += 2.5 * theirs["down"] @ theirs["up"]
    want = plain(merged, condition(2, 3))
    np.testing.assert_allclose(velocity(LATENTS, TIMESTEP), want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - plain(params, condition(2, 3))).max() > 0.1


def test_a_model_is_told_where_its_step_ends(monkeypatch):
    def with_step_end(branch, timestep_end, config):
        return {**branch, "end": timestep_end()}

    def velocity(params, latents, timestep, branch, config, adapters=None, scale=1.0):
        return jnp.zeros_like(latents) + branch["end"][:, None, None, None, None]

    monkeypatch.setattr(two_experts, "with_step_end", with_step_end)
    monkeypatch.setattr(two_experts, "velocity", velocity)
    told = guided_velocity(
        Policy({}), CONFIG, condition(2, 3), condition(3, 1), SCHEDULE, Guidance(1.5)
    )
    ends = np.asarray(told(LATENTS, TIMESTEP))[:, 0, 0, 0, 0]
    np.testing.assert_allclose(ends, 1000 * np.asarray(SCHEDULE.sigmas)[[1, 3, 4]], rtol=1e-6)


def test_a_policy_is_a_tree_with_a_static_scale():
    policy = Policy({"w": np.ones(2)}, {"a": np.ones(3)}, 0.5)
    doubled = jax.tree.map(lambda x: 2 * x, policy)
    assert (doubled.params["w"].sum(), doubled.adapters["a"].sum()) == (4, 6)
    assert doubled.scale == 0.5
    assert jax.tree.structure(policy) != jax.tree.structure(Policy(policy.params, policy.adapters))
