"""Updates of the baselines with a policy of three numbers, against numpy in float64.

The loss is written a second time, from the papers and the authors' code, for whole batches; its
gradient comes from differences. What the update does with micro-batches, shares, chosen steps,
windows and references has to come out the same.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_recipe import TRANSFORMER, VAE

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.flow import noise, windows
from sage_grpo_jax.grpo import trust_region
from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.training import micro_losses, programs, ratio, state
from sage_grpo_jax.training import update as update_lib

BATCH, PIECE = 8, 2
OLD = {"a": 0.4, "b": -0.3, "c": 0.2}  # the policy that samples
OTHER = {"a": 0.45, "b": -0.2, "c": 0.15}
OVERRIDES = {
    "rollout.num_steps": 6,
    "rollout.shift": 3.0,
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 4,
    "rollout.decode_batch": 2,
    "loss.micro_batch": PIECE,
    "video.frames": 5,
    "video.height": 16,
    "video.width": 16,
    "trust_region.kind": "none",
    "loss.equalizer": False,
    "model.transformer": "unused",
    "model.vae": "unused",
}


def velocity(params, latents, timestep, condition, config=None, adapters=None, scale=1.0):
    """a·x + b·t/1000 + c·mean(text); also with numpy arrays."""
    a, b, c = params["a"], params["b"], params["c"]
    extra = b * timestep / 1000 + c * condition.text.mean((1, 2))
    return a * latents + extra.reshape(-1, 1, 1, 1, 1)


@pytest.fixture
def tiny_policy(monkeypatch):
    """The policy of three numbers in place of the DiT."""
    monkeypatch.setattr(hunyuan_video, "velocity", velocity)


class Case:
    """A recipe with its jitted update and one rollout of `OLD`."""

    def __init__(self, rate=1.0, **overrides):
        self.rate = rate
        config = schema.default_config()
        config.update_from_flattened_dict({**OVERRIDES, **overrides})
        self.config = builder.from_config_dict(config)
        self.plan = plan_lib.make_plan(self.config, TRANSFORMER, VAE)
        self.steps = self.plan.steps
        rng = np.random.default_rng(0)
        hashes = np.repeat(np.uint32([5, 9]), 4)
        self.keys = noise.sample_keys(1, 0, np.arange(8) // 4, hashes, np.arange(8) % 4)
        text = jnp.float32(rng.normal(size=(BATCH, 3, 8)))
        self.condition = hunyuan_video.Condition(text, jnp.ones((BATCH, 3), bool))
        negative = hunyuan_video.Condition(
            jnp.float32(rng.normal(size=(1, 3, 8))), jnp.ones((1, 3), bool)
        )
        self.frozen = micro_losses.Frozen(negative)
        self.advantages = jnp.float32(rng.normal(size=BATCH))
        self.valid = jnp.asarray([1, 1, 1, 0, 1, 1, 1, 1], bool)
        self.starts = jnp.zeros(BATCH, jnp.int32)
        rollout = jax.jit(programs.make_rollout(self.plan))
        old = {name: jnp.float32(value) for name, value in OLD.items()}
        self.trajectory = rollout(old, self.condition, self.frozen, self.keys, self.starts)
        self.tx = optax.chain(optax.sgd(rate), trust_region.trust_region(self.config.trust_region))
        shape, steps = self.plan.latent_shape, range(self.config.rollout.num_steps)
        draw = noise.forward_noise if self.plan.is_forward else noise.step_noise
        self.draws = [np.asarray(draw(self.keys, t, shape), np.float64) for t in steps]
        self.fixed_weights = {}  # of the adaptive form of NFT
        self.update = jax.jit(update_lib.make_update(self.plan, self.tx))

    def state(self, **changes):
        params = {name: jnp.float32(value) for name, value in OLD.items()}
        return state.init_state(self.tx, params, self.config.averages)._replace(**changes)

    def updates(self, first, count=1, place=lambda batch: batch):
        """(states after each update, metrics of each); all updates of one rollout."""
        batch = place(
            update_lib.UpdateBatch(
                self.trajectory.latents,
                self.keys,
                self.condition,
                self.advantages,
                self.valid,
                self.starts,
            )
        )
        mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "context"), devices=jax.devices()[:1])
        shapes = ratio.abstract_old_means(self.plan, mesh)
        old = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        limits, states, metrics = ratio.Gate.of(self.config).limits, [first], []
        for _ in range(count):
            new, values, old = self.update(states[-1], batch, self.frozen, limits, old)
            assert values["update/applied"], values
            states.append(new)
            metrics.append(values)
        return states, metrics

    def guided(self, params, latents, t, constant=None):
        """The velocity in numpy; `constant`: parameters of the other branch of guidance."""
        time = np.full(len(latents), 1000 * np.float64(self.plan.schedule.sigmas[t]))
        conditions = [
            hunyuan_video.Condition(np.asarray(c.text, np.float64), None)
            for c in (self.condition, self.frozen.negative)
        ]
        positive = velocity(params, latents, time, conditions[0])
        scale = self.config.rollout.guidance
        if scale == 1:
            return positive
        other = conditions[1]._replace(text=np.repeat(conditions[1].text, len(latents), 0))
        negative = velocity(constant or params, latents, time, other)
        return negative + scale * (positive - negative)

    def state_after(self, t):
        """x_t of the rollout, [B, t, h, w, C]; float64."""
        flat = np.asarray(self.trajectory.latents[t], np.float64)
        return flat.reshape(-1, *self.plan.latent_shape)

    def transition(self, params, t, constant=None):
        """(mean, std) of step t at the states of the rollout, as Flow-GRPO prints it."""
        assert self.config.rollout.sde == "flow"
        sigmas = np.asarray(self.plan.schedule.sigmas, np.float64)
        x, s = self.state_after(t), sigmas[t]
        dt, eta, clamp = sigmas[t + 1] - s, self.config.rollout.eta, self.config.rollout.clamp
        distance = max(1 - s, clamp) if clamp else 1 - (sigmas[1] if s == 1 else s)
        g = eta * np.sqrt(s / distance)
        v = self.guided(params, x, t, constant)
        mean = x * (1 + g**2 * dt / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
        return mean, g * np.sqrt(-dt)


def gradient(loss, params):
    """Central differences of a function of the three numbers."""
    found = {}
    for name in params:
        ends = (loss({**params, name: params[name] + step}) for step in (1e-6, -1e-6))
        above, below = ends
        found[name] = (above - below) / 2e-6
    return found


def assert_moved_by(case, before, after, wanted, rtol=2e-4):
    """Gradient descent went from one state to the next by the gradient that is wanted."""
    scale = max(map(abs, wanted.values()))
    for name, value in wanted.items():
        found = (float(before.params[name]) - float(after.params[name])) / case.rate
        assert found == pytest.approx(value, rel=rtol, abs=rtol * scale), name


def log_prob(x, mean, std):
    return -np.mean((x - mean) ** 2, axis=(1, 2, 3, 4)) / (2 * std**2)


def ppo_loss(case, params, old_mean, steps_of, members, constant=None, penalty=None):
    """Mean over the members and their steps of the clipped loss, plus the weighted penalty."""
    entries, clip = [], case.config.loss.clip_range
    advantages = np.asarray(case.advantages, np.float64)
    for t in range(case.config.rollout.num_steps):
        here = [b for b in members if t in steps_of[b]]
        if not here:
            continue
        mean, std = case.transition(params, t, constant)
        x = old_mean[t] + std * case.draws[t]
        r = np.exp(log_prob(x, mean, std) - log_prob(x, old_mean[t], std))
        for b in here:
            a = advantages[b]
            value = max(-a * r[b], -a * np.clip(r[b], 1 - clip, 1 + clip))
            entries.append(value + (penalty(mean, std, t)[b] if penalty else 0.0))
    return np.mean(entries)


def means_of(case, params):
    steps = range(case.config.rollout.num_steps)
    return [case.transition(params, t)[0] for t in steps if case.steps.counted[t]]


FLOW = {"rollout.sde": "flow", "rollout.eta": 0.7}
VALID = [0, 1, 2, 4, 5, 6, 7]


def test_each_update_has_its_share_of_the_samples(tiny_policy):
    """Two updates: even samples at ratio 1, then odd ones against the means before the first."""
    split = {"loss.updates_per_rollout": 2, "loss.split_updates": True, "loss.clip_range": 5e-4}
    case = Case(rate=3.0, **FLOW, **split)
    states, metrics = case.updates(case.state(), 2)
    steps_of = [set(np.flatnonzero(case.steps.trained))] * BATCH
    old = means_of(case, OLD)
    for turn in (0, 1):
        members = [b for b in VALID if b % 2 == turn]
        params = {name: float(value) for name, value in states[turn].params.items()}

        def loss(params, members=members):
            return ppo_loss(case, params, old, steps_of, members)

        assert_moved_by(case, *states[turn : turn + 2], gradient(loss, params), rtol=2e-3)
    assert metrics[0]["ratio/max_deviation"] == 0
    assert 0.1 < metrics[1]["ratio/clip_fraction"] < 0.9


@pytest.mark.parametrize(("choice", "clamp"), [("first", 0.0), ("random", 0.2)])
def test_samples_are_trained_at_their_own_steps(tiny_policy, choice, clamp):
    case = Case(
        **FLOW,
        **{
            "rollout.clamp": clamp,
            "rollout.last_step": "stochastic",
            "rollout.trained_fraction": 0.5,
            "rollout.trained_choice": choice,
        },
    )
    assert case.steps.positions == 3
    # All six steps inject noise, whichever are trained.
    stds = [case.transition(OLD, t)[1] for t in range(6)]
    np.testing.assert_allclose(np.asarray(case.trajectory.stds).T, stds, rtol=1e-5)
    (before, after), _ = case.updates(case.state())
    steps_of = [{0, 1, 2}] * BATCH
    if choice == "random":
        steps_of = list(map(set, np.asarray(noise.chosen_steps(case.keys, 6, 3)).tolist()))
        assert len(set(map(frozenset, steps_of))) > 3
        assert case.steps.trained.all()
    old = means_of(case, OLD)
    wanted = gradient(lambda p: ppo_loss(case, p, old, steps_of, VALID), OLD)
    assert_moved_by(case, before, after, wanted)


def test_a_moving_window_trains_where_it_injects(tiny_policy):
    motion = {"stay": 3, "stride": 2, "least_stay": 1}
    case = Case(
        **FLOW,
        **{"rollout.window": "decay", "rollout.window_size": 2},
        **{f"rollout.window_motion.{name}": value for name, value in motion.items()},
    )
    from sage_grpo_jax.config import step_plan

    starts = [
        int(step_plan.window_starts(case.steps, case.config, step, np.uint32([5, 9]))[1])
        for step in range(6)
    ]
    # 3 rollouts, then floor(3·3/5 + 2/5) = 2, then again: the third place would not fit.
    assert starts == [0, 0, 0, 2, 2, 0]
    assert windows.start_at(3, "decay", 5, 2, windows.Motion(**motion)) == 2
    case.starts = jnp.full(BATCH, 2, jnp.int32)
    rollout = jax.jit(programs.make_rollout(case.plan))
    old = {name: jnp.float32(value) for name, value in OLD.items()}
    case.trajectory = rollout(old, case.condition, case.frozen, case.keys, case.starts)
    noisy = np.asarray(case.trajectory.stds) > 0
    np.testing.assert_array_equal(noisy.T, [[0, 0, 1, 1, 0, 0]] * BATCH)
    (before, after), _ = case.updates(case.state())
    means = means_of(case, OLD)
    wanted = gradient(lambda p: ppo_loss(case, p, means, [{2, 3}] * BATCH, VALID), OLD)
    assert_moved_by(case, before, after, wanted)


def test_the_gradient_through_the_condition_alone(tiny_policy):
    case = Case(**FLOW, **{"rollout.guidance": 3.0, "loss.guidance_gradient": "condition"})
    (before, after), _ = case.updates(case.state())
    steps = [set(np.flatnonzero(case.steps.trained))] * BATCH
    old = means_of(case, OLD)
    wanted = gradient(lambda p: ppo_loss(case, p, old, steps, VALID, constant=OLD), OLD)
    assert_moved_by(case, before, after, wanted)
    both = gradient(lambda p: ppo_loss(case, p, old, steps, VALID), OLD)
    assert abs(both["a"] - wanted["a"]) > 0.1 * abs(wanted["a"])


def test_the_penalty_of_flow_grpo(tiny_policy):
    """0.04·mean((μ - μ_ref)²)/(2·g²): the denominator lacks the length of the step."""
    case = Case(
        **FLOW,
        **{"trust_region.kind": "fixed", "trust_region.kl_time_weight": "step_length"},
    )
    assert case.config.trust_region.final_weight == 0.04
    first = case.state()
    region = trust_region.find_state(first.opt_state)
    anchor = {name: jnp.float32(value) for name, value in OTHER.items()}
    opt_state = jax.tree.map(
        lambda node: node._replace(anchor=anchor) if node is region else node,
        first.opt_state,
        is_leaf=lambda node: node is region,
    )
    (before, after), (metrics,) = case.updates(first._replace(opt_state=opt_state))
    sigmas = np.asarray(case.plan.schedule.sigmas, np.float64)

    def penalty(mean, std, t):
        g = std / np.sqrt(sigmas[t] - sigmas[t + 1])
        reference, _ = case.transition(OTHER, t)
        return 0.04 * np.mean((mean - reference) ** 2, axis=(1, 2, 3, 4)) / (2 * g**2)

    steps = [set(np.flatnonzero(case.steps.trained))] * BATCH
    old = means_of(case, OLD)

    def loss(params):
        return ppo_loss(case, params, old, steps, VALID, penalty=penalty)

    assert_moved_by(case, before, after, gradient(loss, OLD))
    alone = ppo_loss(case, OLD, old, steps, VALID)
    wanted = loss(OLD) - alone
    assert 0.04 * float(metrics["kl/anchor"]) == pytest.approx(wanted, rel=1e-4)


NFT = {
    "loss.objective": "nft",
    "rollout.sde": "ode",
    "rollout.trained_fraction": 0.5,
    "rollout.trained_choice": "random",
    "advantage.clip": 2.0,
}


def nft_loss(case, params, steps_of, members, reference=None):
    """The loss of scripts/train_nft_sd3.py for whole batches."""
    config, entries = case.config, []
    clean = case.state_after(-1)
    axes = (1, 2, 3, 4)
    for t in range(config.rollout.num_steps):
        s = np.float64(case.plan.schedule.sigmas[t])
        x = (1 - s) * clean + s * case.draws[t]
        new, old = case.guided(params, x, t), case.guided(OLD, x, t)
        beta, clip = config.nft.beta, config.advantage.clip
        advantages = np.asarray(case.advantages, np.float64)
        r = np.clip(np.clip(advantages, -clip, clip) / clip / 2 + 0.5, 0, 1)
        losses = []
        for implicit in (beta * new + (1 - beta) * old, (1 + beta) * old - beta * new):
            predicted = x - s * implicit
            # The weights of the adaptive form have no gradient.
            fixed = case.fixed_weights.setdefault(
                (t, len(losses)), np.abs(predicted - clean).mean(axes)
            )
            losses.append(((predicted - clean) ** 2).mean(axes) / np.maximum(fixed, 1e-5))
        values = clip * (r * losses[0] + (1 - r) * losses[1]) / beta
        if reference is not None:
            far = (new - case.guided(reference, x, t)) ** 2
            values = values + config.trust_region.final_weight * far.mean(axes)
        entries += [values[b] for b in members if t in steps_of[b]]
    return float(np.mean(entries))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_update_of_diffusion_nft(tiny_policy, guidance):
    """Noised clean samples, implicit policies around the one that sampled, a fixed reference."""
    case = Case(
        **NFT,
        **{
            "nft.beta": 0.6,
            "rollout.guidance": guidance,
            "trust_region.kind": "fixed",
            "trust_region.fixed_weight": 0.3,
        },
    )
    # Clean samples alone: the end of the chain along the ODE.
    assert case.trajectory.latents.shape[0] == 1
    sigmas = np.asarray(case.plan.schedule.sigmas, np.float64)
    x = np.asarray(noise.initial_noise(case.keys, case.plan.latent_shape), np.float64)
    for t in range(len(sigmas) - 1):
        x = x + (sigmas[t + 1] - sigmas[t]) * case.guided(OLD, x, t)
    np.testing.assert_allclose(case.state_after(-1), x, atol=1e-4)
    assert case.steps.positions == 3
    sampling = {name: jnp.float32(value) for name, value in OLD.items()}
    params = {name: jnp.float32(value) for name, value in OTHER.items()}
    first = case.state(params=params, sampling=sampling)
    (before, after), (metrics,) = case.updates(first)
    steps_of = list(map(set, np.asarray(noise.chosen_steps(case.keys, 6, 3)).tolist()))
    assert set.union(*steps_of) == set(range(6))
    nft_loss(case, OTHER, steps_of, VALID)  # fixes the weights at these parameters

    def loss(params):
        return nft_loss(case, params, steps_of, VALID, reference=OLD)

    assert_moved_by(case, before, after, gradient(loss, OTHER))
    assert float(metrics["loss/total"]) == pytest.approx(loss(OTHER), rel=1e-4)
    assert not any(name.startswith("ratio/") for name in metrics)


@pytest.mark.parametrize("recipe_of", [FLOW, NFT])
def test_two_devices_train_what_one_trains(tiny_policy, recipe_of):
    """Shares of a rollout and chosen steps, with the samples divided over devices."""
    choice = {"rollout.trained_fraction": 0.5, "rollout.trained_choice": "random"}
    split = {"loss.updates_per_rollout": 2, "loss.split_updates": True}
    case = Case(rate=3.0, **{**recipe_of, **choice, **split})
    alone, metrics = case.updates(case.state(), 2)
    mesh = mesh_lib.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    rows = sharding.batch_sharding(mesh)

    def place(batch):
        latents = jax.device_put(batch.latents, sharding.batch_sharding(mesh, 1))
        return jax.device_put(batch._replace(latents=None), rows)._replace(latents=latents)

    with jax.set_mesh(mesh):
        whole = sharding.replicated(mesh)
        case.frozen = jax.device_put(case.frozen, whole)
        together, on_mesh = case.updates(jax.device_put(case.state(), whole), 2, place)
    for one, two in zip(metrics, on_mesh, strict=True):
        assert float(two["loss/total"]) == pytest.approx(float(one["loss/total"]), abs=1e-6)
        assert float(two["grad/norm"]) == pytest.approx(float(one["grad/norm"]), rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        alone[2].params,
        together[2].params,
    )


def test_the_policy_that_samples_follows_at_the_end_of_a_rollout(tiny_policy):
    """Two updates a rollout: v_old stays for both, then it is a step of the average further."""
    case = Case(
        **NFT,
        **{
            "loss.updates_per_rollout": 2,
            "loss.split_updates": True,
            "nft.decay_start": 1,
            "nft.decay_rate": 0.3,
            "ema.decay": 0.5,
            "ema.every": 2,
        },
    )
    states, _ = case.updates(case.state(), 2)
    for name, value in OLD.items():
        first, last = (float(s.params[name]) for s in states[1:])
        assert float(states[1].sampling[name]) == np.float32(value)
        assert float(states[1].ema[name]) == np.float32(value)
        # After two updates: min(0.3·(2 - 1), 0.5) of the sampling policy stays, and
        # min(3/12, 0.5) of the average.
        assert float(states[2].sampling[name]) == pytest.approx(0.3 * value + 0.7 * last, rel=1e-5)
        assert float(states[2].ema[name]) == pytest.approx(0.25 * value + 0.75 * last, rel=1e-5)
        assert first != last
    assert states[2].sampled is states[2].sampling
    assert states[0]._replace(sampling=None).sampled is states[0].params


def test_an_update_that_is_skipped_leaves_the_averages_alone(tiny_policy):
    case = Case(**NFT, **{"ema.decay": 0.9})
    first = case.state()
    case.advantages = case.advantages.at[1].set(jnp.nan)
    batch = update_lib.UpdateBatch(
        case.trajectory.latents, case.keys, case.condition, case.advantages, case.valid, case.starts
    )
    limits = ratio.Gate.of(case.config).limits
    new, metrics, _ = case.update(first, batch, case.frozen, limits, None)
    assert not metrics["update/applied"]
    assert not metrics["update/finite_loss"]
    jax.tree.map(np.testing.assert_array_equal, new, first)


def test_shares_of_all_updates_are_the_batch():
    """Every sample is trained once in a rollout, every group in every update."""
    for updates, pieces in itertools.product((2, 4), (4, 8)):
        share = [
            [b for b in range(16) if (b % pieces) % updates == turn] for turn in range(updates)
        ]
        assert sorted(itertools.chain(*share)) == list(range(16))
        for members in share:
            groups = [b // 4 for b in members]
            assert all(groups.count(g) == 4 // updates for g in range(4))
    assert math.gcd(64, 64 // 2) == 32  # what `methods.apply` makes of the quick start
