"""Which way an update goes: better samples become likelier, a larger λ holds the policy back."""

from concurrent import futures

import jax
import jax.numpy as jnp
import learners
import numpy as np
import pytest
import small_policy
import textbook
from whole_step import build_programs, make_conditions, make_problem, wide

from sage_grpo_jax.rewards import types as reward_types


class FixedScorer:
    """The same reward for sample b in every step, however the video looks."""

    fingerprint = "fixed"

    def __init__(self, rewards) -> None:
        self.rewards = rewards

    def submit(self, video, prompt, request_id, fps) -> futures.Future:
        future: futures.Future = futures.Future()
        scores = dict.fromkeys(("VQ", "MQ", "TA"), self.rewards[int(request_id.split("/")[-1])])
        future.set_result(reward_types.RewardResult(True, reward_types.OK, scores=scores))
        return future


@pytest.fixture
def make_trainer(make_small_config, one_device, tmp_path, monkeypatch):
    """make_trainer(overrides, rewards [B]) -> trainer of the small policy."""
    small_policy.install_in_small_network(monkeypatch)

    def make(overrides, rewards):
        config = make_small_config(overrides)
        return learners.make(config, FixedScorer(rewards), one_device, tmp_path, build_programs)

    return make


class Rollout:
    """The first rollout of a trainer in float64, and what policies make of it."""

    def __init__(self, trainer, batch) -> None:
        self.problem, self.conditions = make_problem(trainer), make_conditions(trainer, batch)
        problem = self.problem
        noise = textbook.draws(problem.config, batch.ids, 0, problem.shape, problem.places)
        with jax.enable_x64(True):
            self.states = problem.rollout(wide(trainer.state.params), self.conditions, noise)
            self._means = jax.jit(self._all_means)

    def _all_means(self, params):
        states, conditions = self.states, self.conditions
        return [
            self.problem.step_mean(params, states[t], t, conditions) for t in self.problem.trainable
        ]

    def means(self, params) -> dict[int, np.ndarray]:
        """Of the policy at every trained step, by step."""
        with jax.enable_x64(True):
            found = [np.asarray(m) for m in self._means(wide(params))]
        return dict(zip(self.problem.trainable, found, strict=True))

    def log_probs(self, params) -> np.ndarray:
        """Of each trajectory, but for constants, every step weighted with S_t; [B]."""
        problem, total = self.problem, 0.0
        for t, mean in self.means(params).items():
            after = np.asarray(self.states[t + 1])
            total = total + problem.weights[t] * problem.log_prob(after, mean, t)
        return total

    def shift(self, first, last) -> float:
        """How far the means have gone, root mean square in standard deviations of their steps."""
        old, new = self.means(first), self.means(last)
        gaps = [(new[t] - old[t]) / self.problem.stds[t] for t in old]
        return float(np.sqrt(np.mean(np.square(gaps))))


@pytest.mark.parametrize("sde", ["precise", "flow", "dance", "cps"])
@pytest.mark.parametrize("objective", ["ppo", "reinforce"])
def test_an_update_raises_the_better_sample_and_lowers_the_worse(make_trainer, sde, objective):
    overrides = {
        "rollout.sde": sde,
        "rollout.prompts_per_step": 1,
        "rollout.group_size": 2,
        "rollout.decode_batch": 2,
        "loss.micro_batch": 2,
        "loss.objective": objective,
        "optimizer.learning_rate": 1e-4,
        "trust_region.kind": "none",
    }
    trainer = make_trainer(overrides, None)
    batch = next(iter(trainer.prompts))
    rollout = Rollout(trainer, batch)
    before = rollout.log_probs(trainer.state.params)
    for rewards in ([0.2, 0.1], [-3.0, -2.5]):
        trainer.learner.scoring.scorer.rewards = rewards
        first = jax.tree.map(jnp.copy, trainer.state)
        state, metrics = trainer.learner.step(first, batch)
        assert metrics["update/applied"] == 1
        change = rollout.log_probs(state.params) - before
        better = int(np.argmax(rewards))
        assert change[better] > 1e-6
        assert change[1 - better] < -1e-6


# whole_update_test.py compares the gradient of each kind; what a weight does is the same in all.
@pytest.mark.parametrize(
    "kind", ["fixed", *(pytest.param(k, marks=pytest.mark.slow) for k in ("moving", "stepwise"))]
)
def test_a_larger_weight_of_the_kl_moves_the_policy_less(
    make_config, one_device, tmp_path, monkeypatch, kind
):
    small_policy.install(monkeypatch)  # with as many parameters as the DiT the KLs count for more
    rewards = np.random.default_rng(0).standard_normal(16)
    shifts = []
    for weight in (0.0, 5.0, 100.0):
        config = make_config(
            {
                "trust_region.kind": kind,
                "trust_region.anchor_every": 4,
                "trust_region.previous_weight": 1.0,
                "trust_region.fixed_weight": weight,
                "trust_region.initial_weight": weight,
                "trust_region.final_weight": weight,
                "trust_region.min_weight": 0.0,
                "trust_region.feedback": "none",
                "optimizer.learning_rate": 0.01,
                "optimizer.eps": 1e-2,
            }
        )
        trainer = learners.make(config, FixedScorer(rewards), one_device, tmp_path, build_programs)
        rollout, first = Rollout(trainer, next(iter(trainer.prompts))), trainer.params()
        metrics = trainer.steps(6)
        assert {m["kl/weight"] for m in metrics} == {np.float32(weight)}
        shifts.append(rollout.shift(first, trainer.params()))
    assert shifts[0] > 1.1 * shifts[1] > 1.1**2 * shifts[2] > 0
