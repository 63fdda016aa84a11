"""Rollout and evaluation as compiled for a run, against plain loops in float64.

The network is a few lines that read everything a velocity depends on: so the loops can be written
from the formulas, and what compiles is small.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import learners
import numpy as np
import pytest

from sage_grpo_jax.flow import noise
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.policy import conditions

P, G = 2, 3
SHIFT, ETA, CLAMP = 3.0, 0.7, 3e-3
OVERRIDES = {
    "rollout.prompts_per_step": P,
    "rollout.group_size": G,
    "rollout.decode_batch": 3,
    "rollout.num_steps": 4,
    "rollout.shift": SHIFT,
    "rollout.eta": ETA,
    "rollout.guidance": 2.5,
    "loss.micro_batch": 3,
    "eval.num_steps": 3,
    "trust_region.kind": "none",
}


def plain_velocity(kernel, x, timestep, text, mask, adapter=0.0, xp=np):
    """[B, t, h, w, C]; every argument matters."""
    words = (text * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    told = words @ kernel[: text.shape[-1]] + 1e-3 * timestep[:, None]
    return xp.tanh(0.5 * x @ (kernel.T @ kernel) + told[:, None, None, None] + adapter)


@pytest.fixture
def small_network(monkeypatch):
    def velocity(params, latents, timestep, condition, config, adapters=None, scale=1.0):
        adapter = 0.0
        if adapters is not None:
            first = [jax.tree.leaves(tree)[0] for tree in (adapters["blocks"], params)]
            adapter = scale * jnp.mean(first[0]) + 0 * jnp.mean(first[1])
        kernel = params["final"]["proj"]["kernel"]
        text, mask = condition.text, condition.text_mask
        return plain_velocity(kernel, latents, timestep, text, mask, adapter, xp=jnp)

    monkeypatch.setattr(hunyuan_video, "velocity", velocity)


@dataclasses.dataclass
class Case:
    """A learner, a batch, and its guided velocity in float64."""

    trainer: object
    batch: conditions.PromptBatch
    kernel: np.ndarray
    adapter: float = 0.0

    def velocity(self, x, sigma, batch):
        negative = self.trainer.prompts.negative
        timestep = np.full(len(x), 1000 * sigma)

        def branch(text, mask):
            return plain_velocity(self.kernel, x, timestep, text, mask, self.adapter)

        positive = branch(batch.text.astype(np.float64), batch.mask)
        rows = [0] * len(x)
        other = branch(negative.text[rows].astype(np.float64), negative.mask[rows])
        assert np.abs(positive - other).max() > 1e-3
        return other + 2.5 * (positive - other)


@pytest.fixture
def make_case(make_config, local_scorer, one_device, tmp_path, small_network):
    def make(overrides=None) -> Case:
        config = make_config({**OVERRIDES, **(overrides or {})})
        trainer = learners.make(config, local_scorer(), one_device, tmp_path)
        base = trainer.learner.frozen.base
        params = trainer.state.params if base is None else base
        kernel = np.asarray(params["final"]["proj"]["kernel"], np.float64)
        return Case(trainer, next(iter(trainer.prompts)), kernel)

    return make


def sigmas_of(steps: int) -> np.ndarray:
    u = np.linspace(1, 0, steps + 1)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def rolled_out(case, params=None):
    """(latents, stds) of the compiled rollout."""
    learner, state = case.trainer.learner, case.trainer.state
    found = learner.programs.rollout(
        state.params if params is None else params,
        learner.condition(case.batch.repeat(G)),
        learner.frozen,
        learner.sample_keys(case.batch, 2),
        learner.window_starts(case.batch, 2),
    )
    latents = np.asarray(found.latents, np.float64)
    shape = case.trainer.learner.plan.latent_shape
    return latents.reshape(*latents.shape[:2], *shape), np.asarray(found.stds, np.float64)


def plain_rollout(case):
    """SAGE-GRPO's integrated variance, the last step along the ODE."""
    learner, batch = case.trainer.learner, case.batch.repeat(G)
    keys, shape = learner.sample_keys(case.batch, 2), learner.plan.latent_shape
    sigmas = sigmas_of(4)
    x = np.asarray(noise.initial_noise(keys, shape), np.float64)
    states, stds = [x], []
    for t, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        v = case.velocity(x, sigma, batch)
        start, end = max(1 - sigma, CLAMP), max(1 - after, CLAMP)
        variance = ETA**2 * (np.log(end / start) - (end - start)) if after > 0 else 0.0
        mean = x + (after - sigma) * v - variance / (2 * sigma) * (x + (1 - sigma) * v)
        draw = np.asarray(noise.step_noise(keys, t, shape), np.float64)
        x = mean + variance**0.5 * draw
        states.append(x)
        stds.append(variance**0.5)
    return np.stack(states), np.array(stds)


def test_rollout(make_case):
    case = make_case()
    latents, stds = rolled_out(case)
    # 5 frames of 32 x 32, compressed 4 times in time and 8 times in space.
    assert latents.shape == (5, P * G, 2, 4, 4, 4)
    states, wanted = plain_rollout(case)
    np.testing.assert_allclose(stds, wanted, rtol=1e-5)
    assert (stds[:-1] > 0.1).all()
    np.testing.assert_allclose(latents, states, atol=2e-5)


def test_evaluation(make_case):
    """The ODE with its own number of steps, the same shift and guidance; no noise but the first."""
    case = make_case()
    learner, batch = case.trainer.learner, case.batch.repeat(G)
    keys = noise.sample_keys(77, 0, 0, np.arange(P * G, dtype=np.uint32), np.arange(P * G))
    found = np.asarray(learner.sample(case.trainer.state.params, batch, keys))
    x = np.asarray(noise.initial_noise(keys, learner.plan.latent_shape), np.float64)
    sigmas = sigmas_of(3)
    for sigma, after in itertools.pairwise(sigmas):
        x = x + (after - sigma) * case.velocity(x, sigma, batch)
    np.testing.assert_allclose(found, x, atol=2e-5)


def test_initial_noise_is_shared_within_a_group_only(make_case):
    case = make_case({"rollout.same_initial_noise": True})
    latents, _ = rolled_out(case)
    own, _ = plain_rollout(case)
    for b in range(P * G):
        np.testing.assert_allclose(latents[0, b], own[0, b - b % G], atol=1e-6)
    assert np.abs(latents[0, 0] - latents[0, G]).max() > 1
    assert np.abs(latents[1, 0] - latents[1, 1]).max() > 0.1  # the steps have noise of their own
    np.testing.assert_allclose(latents[1, 0], own[1, 0], atol=2e-5)


def test_adapters_on_the_frozen_base(make_case):
    case = make_case({"lora.rank": 2, "lora.alpha": 5.0})
    params = jax.tree.map(lambda x: jnp.full_like(x, 0.03), case.trainer.state.params)
    case.adapter = 2.5 * 0.03
    latents, _ = rolled_out(case, params)
    states, _ = plain_rollout(case)
    np.testing.assert_allclose(latents, states, atol=2e-5)
