"""`Learner.step` from rewards to parameters against the papers in float64, leaf by leaf.

The policy is a small function, so that nothing but the algorithm is under test; that of the DiT is
in tests/models. The other side is tests/support/textbook.py, which shares no formula with the
package.
"""

import types
from concurrent import futures

import jax
import learners
import numpy as np
import optax
import pytest
import small_policy
import textbook
from whole_step import as_pixels, build_programs, make_conditions, make_problem, wide

from sage_grpo_jax.grpo import trust_region
from sage_grpo_jax.rewards import types as reward_types

STEPS = 3
PROMPTS, GROUP = 3, 4
BASE = {
    "rollout.prompts_per_step": PROMPTS,
    "rollout.group_size": GROUP,
    "rollout.num_steps": 4,
    "rollout.decode_batch": 4,
    "loss.micro_batch": 4,
    "rewards.weights.VQ": 0.5,
    "rewards.weights.MQ": -0.3,
    "rewards.weights.TA": 1.0,
    # Far above rounding, so that an update is smooth in the gradient.
    "optimizer.eps": 1e-3,
    "optimizer.learning_rate": 0.03,
    "optimizer.weight_decay": 0.1,
    "optimizer.grad_clip": 1e6,
    "trust_region.initial_weight": 0.5,
    "trust_region.final_weight": 2.0,
    "trust_region.warmup_steps": 1,
    "trust_region.target_shift": 0.01,
    "trust_region.anchor_every": 2,
    "trust_region.history": 2,
}
CASES = {
    "sage with guidance": {"rollout.guidance": 2.5},
    "flow, one random window, summed, fixed and stepwise": {
        "rollout.sde": "flow",
        "rollout.guidance": 2.0,
        "rollout.guidance_mode": "sequential",
        "rollout.window": "random_k",
        "rollout.window_size": 2,
        "loss.objective": "reinforce",
        "loss.equalizer": False,
        "loss.log_prob_reduction": "sum",
        "loss.step_reduction": "sum",
        "trust_region.kind": "fixed_stepwise",
        "trust_region.fixed_weight": 0.7,
        "trust_region.kl_time_weight": "equalized",
        "trust_region.anchor_weight": 0.3,
        "trust_region.previous_weight": 0.7,
        "trust_region.step_bound": 1e-4,
    },
    "cps, first steps, squared, moving": {
        "rollout.sde": "cps",
        "rollout.window": "first_k",
        "rollout.window_size": 2,
        "rollout.same_initial_noise": True,
        "loss.log_prob": "squared",
        "loss.median": "mean",
        "loss.micro_batch": 12,
        "trust_region.kind": "moving",
        "trust_region.feedback": "paper",
        "optimizer.grad_clip": 1e-3,
    },
    "dance, last step, three updates, Eq. 15, advantages of each reward": {
        "rollout.sde": "dance",
        "advantage.combine": "per_reward",
        "rollout.last_step": "stochastic",
        "loss.updates_per_rollout": 3,
        "loss.clip_range": 0.02,
        "loss.micro_batch": 2,
        "trust_region.previous_estimator": "log_ratio",
        "optimizer.learning_rate": 0.01,
    },
    "adapters": {
        "lora.rank": 2,
        "lora.alpha": 3.0,
        "lora.learning_rate": 0.05,
        "lora.targets": "proj,high/text",
    },
}


class TableScorer:
    """Gives the rewards of a table, fails where it says so, and keeps the videos."""

    fingerprint = "table"

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        count = PROMPTS * GROUP
        self.rewards = {n: rng.standard_normal((STEPS, count)) for n in ("VQ", "MQ", "TA")}
        self.valid = np.ones((STEPS, count), bool)
        # One failure, two in one group, then a group with a single reward.
        for step, failed in enumerate(([2], [1, 2, 7], [8, 9, 11])):
            self.valid[step, failed] = False
        self.videos: dict[tuple[int, int], np.ndarray] = {}

    def submit(self, video, prompt, request_id, fps) -> futures.Future:
        step, b = int(request_id.split("/")[0].removeprefix("step")), int(request_id.split("/")[-1])
        self.videos[step, b] = np.array(video)
        future: futures.Future = futures.Future()
        scores = {name: float(values[step, b]) for name, values in self.rewards.items()}
        if self.valid[step, b]:
            result = reward_types.RewardResult(True, reward_types.OK, scores=scores)
        else:
            result = reward_types.RewardResult(False, reward_types.INTERNAL, "on demand")
        future.set_result(result)
        return future


def as_textbook(state) -> dict:
    """A learner's state as textbook.py has it."""
    region = trust_region.find_state(state.opt_state)
    names = ("anchor", "previous", "history", "squared_norm")
    values = {name: wide(getattr(region, name)) for name in names}
    return {
        "params": wide(state.params),
        "mu": wide(optax.tree.get(state.opt_state, "mu")),
        "nu": wide(optax.tree.get(state.opt_state, "nu")),
        "adam_count": int(region.count),
        "count": int(region.count),
        "weight": float(region.weight),
        **values,
        "squared_norm": float(region.squared_norm),
    }


def assert_leaves_agree(found, wanted, tolerance: float) -> None:
    """Every leaf to `tolerance` of its own largest number."""
    pairs = zip(jax.tree.leaves(wide(found)), jax.tree.leaves(wanted), strict=True)
    for place, (ours, theirs) in enumerate(pairs):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= tolerance, f"leaf {place}, shape {ours.shape}: {error:.1e}"


def check_step(trainer, problem, scorer, batch, index: int) -> None:
    """One step of the learner against one of the textbook, from the same state."""
    before = as_textbook(trainer.state)
    trainer.state, metrics = trainer.learner.step(trainer.state, batch)
    conditions = make_conditions(trainer, batch)
    noise = textbook.draws(problem.config, batch.ids, index, problem.shape, problem.places)
    rewards = {name: values[index] for name, values in scorer.rewards.items()}
    with jax.enable_x64(True):
        outcome = textbook.step(problem, before, conditions, noise, rewards, scorer.valid[index])
    after = as_textbook(trainer.state)

    assert metrics["update/applied"] == 1
    videos = np.stack([scorer.videos[index, b] for b in range(PROMPTS * GROUP)])
    assert np.abs(videos.astype(int) - as_pixels(outcome.videos).astype(int)).max() <= 1
    for name, value in outcome.metrics.items():
        assert metrics[name] == pytest.approx(float(value), rel=5e-4, abs=2e-7), name
    elements = sum(leaf.size for leaf in jax.tree.leaves(before["params"]))
    rms = metrics["grad/norm"] / np.sqrt(elements)
    assert metrics["grad/rms_over_eps"] == pytest.approx(rms / problem.config.optimizer.eps)
    # The moments hold the gradient, leaf by leaf.
    assert_leaves_agree(after["mu"], outcome.mu, 5e-4)
    assert_leaves_agree(after["nu"], outcome.nu, 1e-3)
    moved = jax.tree.map(np.subtract, after["params"], before["params"])
    assert_leaves_agree(moved, jax.tree.map(np.subtract, outcome.params, before["params"]), 2e-3)
    check_region(problem.config, before, after, outcome)


def check_region(config, before: dict, after: dict, outcome: textbook.Outcome) -> None:
    """The memory of the trust region after a step."""
    region, updates = config.trust_region, config.loss.updates_per_rollout
    assert after["count"] == before["count"] + updates
    assert after["weight"] == pytest.approx(float(outcome.weight), rel=1e-5)
    np.testing.assert_allclose(after["history"], outcome.history, rtol=1e-3, atol=1e-9)
    assert after["squared_norm"] == pytest.approx(float(outcome.squared_norm), rel=2e-3)
    if after["anchor"] is not None:
        moves = region.kind in ("moving", "dual")
        counts = range(before["count"] + 1, after["count"] + 1)
        renewed = [n for n in counts if moves and n % region.anchor_every == 0]
        if not renewed:
            jax.tree.map(np.testing.assert_array_equal, after["anchor"], before["anchor"])
        elif renewed[-1] == after["count"]:
            jax.tree.map(np.testing.assert_array_equal, after["anchor"], after["params"])
    if after["previous"] is not None and updates == 1:
        jax.tree.map(np.testing.assert_array_equal, after["previous"], before["params"])


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_papers(make_small_config, one_device, tmp_path, monkeypatch, name):
    small_policy.install_in_small_network(monkeypatch)
    scorer = TableScorer()
    config = make_small_config({**BASE, "num_steps": STEPS, **CASES[name]})
    trainer = learners.make(config, scorer, one_device, tmp_path, build_programs)
    batches = iter(trainer.prompts)
    problem, weights = make_problem(trainer), set()
    for index in range(STEPS):
        weights.add(float(trust_region.find_state(trainer.state.opt_state).weight))
        check_step(trainer, problem, scorer, next(batches), index)
    # λ was not the same in any two steps, but for the kind where it is constant.
    assert len(weights) == (1 if config.trust_region.kind == "fixed_stepwise" else STEPS)
    assert min(weights) > 0.1


def test_the_table_scorer_fails_as_it_says():
    """What the cases rely on: each step lacks other samples, and one group is left with one."""
    valid = TableScorer().valid.reshape(STEPS, PROMPTS, GROUP).sum(2)
    assert valid.tolist() == [[3, 4, 4], [2, 3, 4], [4, 4, 1]]
    config = types.SimpleNamespace(
        rewards=types.SimpleNamespace(weights={"VQ": 1.0}),
        rollout=types.SimpleNamespace(group_size=2),
        advantage=types.SimpleNamespace(epsilon=1e-12, clip=5.0, combine="sum"),
    )
    found = textbook.advantages(
        config, {"VQ": np.array([3.0, 1.0, 7.0, np.nan])}, np.array([True, True, True, False])
    )
    np.testing.assert_allclose(found, [1, -1, 0, 0], atol=1e-9)
