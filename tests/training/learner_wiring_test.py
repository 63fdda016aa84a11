"""What belongs together stays together: noise, prompt, clip, reward and advantage of each sample.

The programs are scripted, so that nothing compiles: a rollout whose clean latents hold the number
of the sample, a decoder that shows it, a scorer whose rewards are a function of it.
"""

import dataclasses
import itertools
from concurrent import futures
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.common import phases
from sage_grpo_jax.flow import noise, rollout
from sage_grpo_jax.models import frames
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.rewards import types
from sage_grpo_jax.training import evaluation, programs, scoring
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import state as state_lib
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.blueprint import Blueprint

P, G = 3, 4  # not the same: a transposed group shows
WEIGHTS = {"VQ": 1.0, "MQ": -0.5, "TA": 2.0}
OVERRIDES = {
    "seed": 5,
    "rollout.prompts_per_step": P,
    "rollout.group_size": G,
    "rollout.decode_batch": 3,
    "loss.micro_batch": 3,
    "eval.samples_per_prompt": 2,
    # Each of them changes some advantage.
    "advantage.epsilon": 0.5,
    "advantage.clip": 1.1,
    "advantage.std_floor": 6.0,
    **{f"rewards.weights.{name}": weight for name, weight in WEIGHTS.items()},
}


def reward(name: str, number: int) -> float:
    """Of the clip that shows this number; another order for each dimension."""
    return {"VQ": 7.0, "MQ": 11.0, "TA": 13.0}[name] * ((number * 5 + len(name)) % 12) / 12


@dataclasses.dataclass
class Scripted:
    """Programs and scorer; notes what it is given."""

    blueprint: Blueprint
    failing: frozenset[int] = frozenset()
    code: str = types.INTERNAL
    lacking: dict[int, str] = dataclasses.field(default_factory=dict)  # sample -> reward of NaN
    broken: frozenset[int] = frozenset()  # samples whose latents are not finite
    policies: list = dataclasses.field(default_factory=list)
    keys: list = dataclasses.field(default_factory=list)
    conditions: list = dataclasses.field(default_factory=list)
    starts: list = dataclasses.field(default_factory=list)
    batches: list = dataclasses.field(default_factory=list)
    old: list = dataclasses.field(default_factory=list)
    submitted: dict = dataclasses.field(default_factory=dict)  # request -> (number, prompt, fps)

    def programs(self) -> programs.Programs:
        return programs.Programs(
            blueprint=self.blueprint,
            rollout=self.rollout,
            sample=self.sample,
            decode=self.decode,
            finite=frames.finite_samples,
            update=self.update,
            no_means=lambda: "before",
        )

    def rollout(self, params, condition, frozen, keys, starts):
        """The first states are all 200: a clip of them belongs to no sample."""
        self.policies.append(params)
        self.keys.append(np.asarray(jax.random.key_data(keys)))
        self.conditions.append(condition)
        self.starts.append(np.asarray(starts))
        numbers = np.arange(len(keys), dtype=np.float32)
        numbers[list(self.broken)] = np.nan
        shape = (len(keys), *self.blueprint.plan.latent_shape)
        clean = np.broadcast_to(numbers[:, None, None, None, None], shape)
        states = np.full((3, *shape), 200, np.float32)
        states[-1] = clean
        return rollout.Trajectory(jnp.asarray(states), jnp.zeros(2))

    def sample(self, params, condition, frozen, keys):
        starts = np.zeros(len(keys), np.int32)
        return self.rollout(params, condition, frozen, keys, starts).latents[-1]

    def decode(self, vae_params, latents, piece, size):
        """Pieces as the real program takes them."""
        chunk = update_lib.split_batch(latents, size)[piece]
        return jnp.nan_to_num(chunk[:, :2, :2, :2, :3], nan=77).astype(jnp.uint8)

    def update(self, state, batch, frozen, limits, old):
        self.batches.append(batch)
        self.old.append(old)
        good = ("finite_loss", "finite_gradient", "finite_params", "ratio_in_tolerance", "applied")
        zero = ("ratio/max_deviation", "ratio/rollout_shift", "grad/rms_over_eps")
        metrics = {f"update/{name}": jnp.ones(()) for name in good}
        metrics |= {name: jnp.zeros(()) for name in zero}
        return state, metrics, f"after {len(self.old)}"

    def submit(self, video, prompt, request_id, fps):
        (number,) = np.unique(video)
        assert request_id not in self.submitted
        self.submitted[request_id] = (int(number), prompt, fps)
        future: futures.Future = futures.Future()
        sample = int(request_id.rpartition("/")[2])
        if sample in self.failing:
            future.set_result(types.RewardResult(False, self.code, "on demand"))
            return future
        scores = {name: reward(name, int(number)) for name in ("TA", "VQ", "MQ")}
        if sample in self.lacking:
            scores[self.lacking[sample]] = float("nan")
        future.set_result(types.RewardResult(True, types.OK, scores=scores))
        return future


@pytest.fixture
def make_learner(make_config, one_device):
    """make_learner(overrides, check, **fields of Scripted) -> (learner, its script)."""

    def make(overrides=None, check=None, **fields):
        config = make_config({**OVERRIDES, **(overrides or {})})
        script = Scripted(Blueprint.read(config, one_device), **fields)
        negative = prompt_batch(1)
        learner = learner_lib.Learner(script.programs(), None, negative, script, check=check)
        return learner, script

    return make


def prompt_batch(count: int, repeat: int = 1) -> conditions.PromptBatch:
    """Prompts that differ in everything."""
    text = np.random.default_rng(0).standard_normal((count, 4, 8)).astype(np.float32)
    mask = np.arange(4) <= np.arange(count)[:, None] % 4
    ids = [f"id {i}" for i in range(count)]
    batch = conditions.PromptBatch(ids, [f"prompt {i}" for i in range(count)], text, mask)
    return batch.repeat(repeat)


def state_at(step: int) -> state_lib.LearnerState:
    return state_lib.LearnerState({}, (), jnp.int32(step))


def key_of(*counters: int) -> np.ndarray:
    """By the documented counters: seed, step, slot, prompt, sample."""
    key = jax.random.key(counters[0], impl="threefry2x32")
    for counter in counters[1:]:
        key = jax.random.fold_in(key, counter)
    return np.asarray(jax.random.key_data(key))


def expected_advantages(valid: np.ndarray) -> np.ndarray:
    """One group at a time, in float64."""
    weighted = [sum(w * reward(n, b) for n, w in WEIGHTS.items()) for b in range(P * G)]
    advantages, stds = np.zeros(P * G), []
    for p in range(P):
        members = [b for b in range(p * G, (p + 1) * G) if valid[b]]
        rewards = np.array([weighted[b] for b in members])
        scaled = (rewards - rewards.mean()) / (max(rewards.std(), 6.0) + 0.5)
        advantages[members] = np.clip(scaled, -1.1, 1.1)
        stds.append(rewards.std())
    assert min(stds) < 6.0 < max(stds)
    assert np.sum(np.abs(advantages) == 1.1) in range(1, P * G)
    return advantages


def test_noise_prompt_clip_and_advantage_of_each_sample(make_learner):
    failing = frozenset({1, 6})
    learner, script = make_learner(failing=failing, lacking={10: "MQ"})
    batch = prompt_batch(P)
    state, metrics = learner.step(state_at(7), batch)
    assert int(state.step) == 8

    (condition,), (keys,) = script.conditions, script.keys
    for b in range(P * G):
        p, sample = divmod(b, G)
        np.testing.assert_array_equal(condition.text[b], batch.text[p])
        np.testing.assert_array_equal(condition.text_mask[b], batch.mask[p])
        wanted = key_of(5, 7, p, int(noise.prompt_hash(f"id {p}")), sample)
        np.testing.assert_array_equal(keys[b], wanted)
    # Every clip once, against its own prompt, at the rate of the recipe.
    assert script.submitted == {
        f"step7/id {b // G}/{b}": (b, f"prompt {b // G}", 8.0) for b in range(P * G)
    }

    (update,) = script.batches
    valid = np.array([b not in failing | {10} for b in range(P * G)])
    np.testing.assert_array_equal(update.valid, valid)
    wanted = expected_advantages(valid)
    np.testing.assert_allclose(update.advantages, wanted, atol=1e-5)
    np.testing.assert_array_equal(jax.random.key_data(update.keys), keys)
    np.testing.assert_array_equal(update.latents[-1, :, 0, 0, 0, 0], np.arange(P * G))
    assert script.old == ["before"]

    for name in WEIGHTS:
        mean = np.mean([reward(name, b) for b in np.flatnonzero(valid)])
        assert metrics[f"reward/{name.lower()}"] == pytest.approx(mean, rel=1e-6)
    sums = {"overall": dict.fromkeys(WEIGHTS, 1.0), "weighted": WEIGHTS}
    for key, weights in sums.items():
        total = sum(w * metrics[f"reward/{n.lower()}"] for n, w in weights.items())
        assert metrics[f"reward/{key}"] == pytest.approx(total, rel=1e-5)
    weighted = np.array([sum(w * reward(n, b) for n, w in WEIGHTS.items()) for b in range(P * G)])
    groups = [weighted[b : b + G][valid[b : b + G]] for b in range(0, P * G, G)]
    spread = np.mean([group.std() for group in groups])
    assert metrics["reward/group_std"] == pytest.approx(spread, rel=1e-5)
    assert metrics["reward/valid_fraction"] == np.mean(valid)
    assert metrics["advantage/nonzero_fraction"] == np.mean(wanted != 0)


def test_a_monitored_reward_that_fails_takes_no_sample_out(make_learner):
    monitored = {"rewards.weights.MQ": 0.0}
    learner, script = make_learner(monitored, lacking=dict.fromkeys(range(P * G), "MQ"))
    _, lacking = learner.step(state_at(7), prompt_batch(P))
    learner, whole = make_learner(monitored)
    _, metrics = learner.step(state_at(7), prompt_batch(P))
    (update,), (wanted,) = script.batches, whole.batches
    assert np.asarray(update.valid).all()
    np.testing.assert_array_equal(update.advantages, wanted.advantages)
    assert np.isnan(lacking.pop("reward/mq"))
    assert metrics.pop("reward/mq") == pytest.approx(np.mean([reward("MQ", b) for b in range(12)]))
    assert lacking["reward/overall"] == pytest.approx(metrics["reward/vq"] + metrics["reward/ta"])
    for name in ("overall", "weighted", "group_std", "valid_fraction"):
        assert lacking[f"reward/{name}"] == metrics[f"reward/{name}"]


def test_advantages_of_each_reward_by_itself(make_learner):
    """Settings and weights reach them, and the groups are those of the prompts."""
    settings = {
        "advantage.combine": "per_reward",
        "advantage.std": "group_unbiased",
        "advantage.std_floor": 3.0,
        "advantage.clip": 2.0,
    }
    learner, script = make_learner(settings, failing=frozenset({1, 6}))
    learner.step(state_at(0), prompt_batch(P))
    wanted = np.zeros(P * G)
    for p in range(P):
        members = [b for b in range(p * G, (p + 1) * G) if b not in (1, 6)]
        for name, weight in WEIGHTS.items():
            values = np.array([reward(name, b) for b in members])
            scale = max(values.std(ddof=1), 3.0) + 0.5
            wanted[members] += weight * (values - values.mean()) / scale
    assert np.sum(np.abs(wanted) > 2.0) in range(1, P * G)
    (update,) = script.batches
    np.testing.assert_allclose(update.advantages, np.clip(wanted, -2, 2), atol=1e-5)


def test_every_step_has_its_own_noise_and_windows(make_learner):
    window = {"rollout.window": "random_k", "rollout.window_size": 1}
    learner, script = make_learner(window)
    batch = prompt_batch(P)
    for step in range(8):
        learner.step(state_at(step), batch)
        hashes = np.array([noise.prompt_hash(name) for name in batch.ids])
        starts = noise.window_starts(5, step, np.arange(P), hashes, 3)
        np.testing.assert_array_equal(script.starts[-1], np.repeat(starts, G))
        np.testing.assert_array_equal(script.batches[-1].starts, script.starts[-1])
    assert len(np.unique(np.concatenate(script.keys), axis=0)) == 8 * P * G
    assert len({tuple(starts) for starts in script.starts}) > 2


def test_broken_and_unscored_samples_are_masked_up_to_a_limit(make_learner):
    learner, script = make_learner(broken=frozenset({2}), failing=frozenset({0, 5}))
    _, metrics = learner.step(state_at(0), prompt_batch(P))
    assert metrics["reward/valid_fraction"] == 0.75  # as many as the recipe asks for
    (update,) = script.batches
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(update.valid)), [0, 2, 5])
    assert not np.any(np.asarray(update.advantages)[[0, 2, 5]])

    learner, script = make_learner(broken=frozenset({2}), failing=frozenset({0, 5, 7}))
    state, metrics = learner.step(state_at(3), prompt_batch(P))
    assert metrics["update/applied"] == 0
    assert not script.batches
    assert int(state.step) == 4  # the next rollout has other noise all the same


def test_several_updates_hand_their_means_on(make_learner):
    learner, script = make_learner({"loss.updates_per_rollout": 3})
    learner.step(state_at(0), prompt_batch(P))
    assert script.old == ["before", "after 1", "after 2"]
    assert len({id(batch) for batch in script.batches}) == 1


def test_a_check_sees_an_update_before_it_is_made(make_learner):
    seen = []

    def check(state, batch, frozen):
        seen.append((int(state.step), batch, frozen, len(script.batches)))
        return {"shadow/loss": 0.25}

    learner, script = make_learner(check=check)
    _, metrics = learner.step(state_at(7), prompt_batch(P))
    ((step, batch, frozen, updates),) = seen
    assert (step, updates) == (7, 0)
    assert batch is script.batches[0]
    assert frozen is learner.frozen
    assert metrics["shadow/loss"] == 0.25
    # Without an update there is nothing to check.
    learner, script = make_learner(check=check, failing=frozenset(range(6)))
    _, metrics = learner.step(state_at(8), prompt_batch(P))
    assert len(seen) == 1
    assert "shadow/loss" not in metrics


def test_rollouts_are_drawn_from_the_policy_that_samples(make_learner):
    learner, script = make_learner()
    learner.step(state_at(0)._replace(params="trained"), prompt_batch(P))
    learner.step(state_at(1)._replace(params="trained", sampling="lagging"), prompt_batch(P))
    assert script.policies == ["trained", "lagging"]


def test_seconds_of_a_phase_add_up(make_learner, monkeypatch):
    """With a clock that goes on by one whenever it is looked at."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(phases, "time", clock)
    learner, _ = make_learner()
    _, metrics = learner.step(state_at(0), prompt_batch(P))
    seconds = {name: value for name, value in metrics.items() if name.startswith("time/")}
    # Twelve samples are decoded three at a time; the last row is the whole step.
    assert seconds == {
        "time/rollout": 1.0,
        "time/decode": 4.0,
        "time/reward": 1.0,
        "time/update": 1.0,
        "time/step": next(ticks) - 1,
    }


def test_another_reward_model_ends_the_run_and_other_failures_do_not(make_learner):
    learner, script = make_learner(failing=frozenset({4}), code=types.FAILED_PRECONDITION)
    with pytest.raises(scoring.RewardModelChangedError, match="another model"):
        learner.step(state_at(0), prompt_batch(P))
    assert not script.batches
    learner, script = make_learner(failing=frozenset({4}), code=types.INVALID_ARGUMENT)
    learner.step(state_at(0), prompt_batch(P))
    assert len(script.batches) == 1


def test_an_evaluation_has_its_own_noise_and_keeps_clips_with_prompts(make_learner):
    """More prompts than a batch holds, so that the last batch is filled up."""
    learner, script = make_learner(failing=frozenset({5}))
    prompts = prompt_batch(9, repeat=2)
    found = evaluation.evaluate(learner, {}, prompts)
    assert found.metrics["eval/reward/valid_fraction"] == 16 / 18  # the sixth of each batch fails
    keys = np.concatenate(script.keys)
    seed = learner.config.eval.seed
    for row in range(18):
        wanted = key_of(seed, 0, 0, int(noise.prompt_hash(prompts.ids[row])), row % 2)
        np.testing.assert_array_equal(keys[row], wanted)
        text = script.conditions[row // 12].text[row % 12]
        np.testing.assert_array_equal(text, prompts.text[row])
        # The clip shows the place in its batch, and has the scores of that.
        np.testing.assert_array_equal(found.videos[row], row % 12)
        for name, values in found.scores.items():
            wanted = float("nan") if row % 12 == 5 else reward(name, row % 12)
            assert values[row] == pytest.approx(wanted, nan_ok=True)
    for request, (number, prompt, fps) in script.submitted.items():
        batch, name, row = request.removeprefix("eval").split("/")
        assert (number, fps) == (int(row), 8.0)
        row = (int(batch) + int(row)) % 18
        assert (name, prompt) == (prompts.ids[row], prompts.prompts[row])
    assert len(found.videos) == 18
    assert found.prompts == prompts.prompts
