"""One step of GRPO written from the papers in float64: rewards in, the next state out.

What is under test shares nothing with it but the config object and the shape of the state. Formulas
are those of the papers as printed: differences of log-probabilities, variances, autodiff; noise is
drawn from the documented counters. Slow and plain on purpose.
"""

import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLAMP = 3e-3


class Outcome(NamedTuple):
    """What a step leaves, float64."""

    params: Any
    mu: Any  # Adam's first moments
    nu: Any
    weight: float  # λ of the next step
    history: np.ndarray
    squared_norm: float
    metrics: dict[str, float]  # of the last update
    videos: np.ndarray  # clean latents [B, ...]


# Schedule and transition


def schedule(steps: int, shift: float) -> np.ndarray:
    """σ, [T + 1]."""
    u = np.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def variance(kind: str, sigmas: np.ndarray, t: int, eta: float) -> float:
    """Of the noise that step t injects."""
    sigma, after = sigmas[t], sigmas[t + 1]
    if kind == "precise":
        a, b = max(1 - sigma, CLAMP), max(1 - after, CLAMP)
        return eta**2 * (math.log(b / a) - (b - a))
    if kind == "flow":
        distance = 1 - (sigmas[1] if sigma == 1 else sigma)
        return eta**2 * sigma / distance * (sigma - after)
    if kind == "dance":
        return eta**2 * (sigma - after)
    if kind == "cps":
        return (after * math.sin(eta * math.pi / 2)) ** 2
    raise ValueError(f"kind={kind!r}: the textbook has no formula for it")


def mean(kind: str, sigmas: np.ndarray, t: int, eta: float, x: Any, v: Any) -> Any:
    """Of the state after step t."""
    sigma, after = sigmas[t], sigmas[t + 1]
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if kind == "ode":
        return x + (after - sigma) * v
    if kind == "cps":
        return (1 - after) * clean + after * math.cos(eta * math.pi / 2) * noise
    score = -noise / sigma
    return x + (after - sigma) * v + variance(kind, sigmas, t, eta) / 2 * score


def gradient_scale(kind: str, sigmas: np.ndarray, t: int, eta: float, squared: bool) -> float:
    """|∂mean/∂v| / std, by a difference: the mean is linear in v; times std² if squared."""
    std = math.sqrt(variance(kind, sigmas, t, eta))
    slope = mean(kind, sigmas, t, eta, 0.0, 1.0) - mean(kind, sigmas, t, eta, 0.0, 0.0)
    return abs(slope) * std if squared else abs(slope) / std


# Noise


def sample_key(seed: int, step: int, slot: int, prompt: str, sample: int) -> jax.Array:
    key = jax.random.key(seed, impl="threefry2x32")
    digest = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    for counter in (step, slot, digest, sample):
        key = jax.random.fold_in(key, np.uint32(counter))
    return key


class Draws(NamedTuple):
    initial: np.ndarray  # [B, ...]
    steps: np.ndarray  # [T, B, ...]
    starts: np.ndarray  # [B]


def draws(config: Any, ids: list[str], step: int, shape: tuple[int, ...], places: int) -> Draws:
    """The noise of a rollout of P prompts, prompt by prompt and sample by sample."""
    rollout, initial, noise, starts = config.rollout, [], [], []
    for slot, prompt in enumerate(ids):
        # Streams: 0 the start, 1 the steps, 3 the window of a whole group
        window = jax.random.fold_in(sample_key(config.seed, step, slot, prompt, 2**32 - 1), 3)
        start = int(jax.random.randint(window, (), 0, places))
        for sample in range(rollout.group_size):
            key = sample_key(config.seed, step, slot, prompt, sample)
            first = key
            if rollout.same_initial_noise:
                first = sample_key(config.seed, step, slot, prompt, 0)
            initial.append(jax.random.normal(jax.random.fold_in(first, 0), shape, jnp.float32))
            stream = jax.random.fold_in(key, 1)
            noise.append(
                [
                    jax.random.normal(jax.random.fold_in(stream, t), shape, jnp.float32)
                    for t in range(rollout.num_steps)
                ]
            )
            starts.append(start)
    wide = np.asarray(noise, np.float64)
    return Draws(np.asarray(initial, np.float64), np.moveaxis(wide, 0, 1), np.asarray(starts))


# Advantages


def advantages(config: Any, rewards: dict[str, np.ndarray], valid: np.ndarray) -> np.ndarray:
    """[B]; 0 where there is no reward."""
    weights = {name: weight for name, weight in config.rewards.weights.items() if weight}
    parts = [(1.0, sum(weight * rewards[name] for name, weight in weights.items()))]
    if config.advantage.combine == "per_reward":
        parts = [(weight, rewards[name]) for name, weight in weights.items()]
    result = np.zeros(len(valid))
    group = config.rollout.group_size
    for start in range(0, len(valid), group):
        members = [b for b in range(start, start + group) if valid[b]]
        for weight, column in parts:
            scores = np.array([column[b] for b in members])
            for b, score in zip(members, scores, strict=True):
                scaled = (score - scores.mean()) / (scores.std() + config.advantage.epsilon)
                result[b] += weight * scaled
    return np.clip(result, -config.advantage.clip, config.advantage.clip)


# The step


class Problem:
    """The constants of a run, worked out once."""

    def __init__(self, config: Any, shape: tuple[int, ...], velocity: Any) -> None:
        """`velocity(trained, latents, timestep [B], condition)` is the policy without guidance."""
        self.config, self.shape, self.velocity = config, shape, velocity
        self.rollout = jax.jit(self._rollout)
        self.gradient = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

        # Schedule, and the steps that inject noise
        rollout, loss = config.rollout, config.loss
        self.sigmas = schedule(rollout.num_steps, rollout.shift)
        every = range(rollout.num_steps)
        self.stds = [math.sqrt(variance(rollout.sde, self.sigmas, t, rollout.eta)) for t in every]
        last = rollout.num_steps - (rollout.last_step == "deterministic")
        noisy = [t for t in every if self.stds[t] > 0 and t < last]

        # Windows, and what each step weighs
        self.window = rollout.window_size or len(noisy)
        self.trainable = noisy[: self.window] if rollout.window == "first_k" else noisy
        self.places = len(self.trainable) - self.window + 1
        gaussian = self._equalized(squared=False)
        squared = self._equalized(squared=loss.log_prob == "squared")
        self.weights = squared if loss.equalizer else dict.fromkeys(self.trainable, 1.0)
        equalized = config.trust_region.kl_time_weight == "equalized"
        self.kl_weights = {t: gaussian[t] ** 2 if equalized else 1.0 for t in self.trainable}
        self.elements = math.prod(shape) if loss.log_prob_reduction == "sum" else 1

    def _equalized(self, squared: bool) -> dict[int, float]:
        rollout = self.config.rollout
        scales = {
            t: gradient_scale(rollout.sde, self.sigmas, t, rollout.eta, squared)
            for t in self.trainable
        }
        ordered = sorted(scales.values())
        middle = ordered[(len(ordered) - 1) // 2]
        if self.config.loss.median == "mean":
            middle = float(np.median(ordered))
        return {t: middle / scale for t, scale in scales.items()}

    def in_window(self, t: int, starts: Any) -> Any:
        """bool [B], for a step that may be trained."""
        place = self.trainable.index(t)
        return (starts <= place) & (place < starts + self.window)

    def guided(self, trained: Any, x: Any, t: int, conditions: Any) -> Any:
        timestep = jnp.full(x.shape[0], 1000 * self.sigmas[t])
        scale, (with_prompt, without) = self.config.rollout.guidance, conditions
        positive = self.velocity(trained, x, timestep, with_prompt)
        if scale == 1:
            return positive
        negative = self.velocity(trained, x, timestep, without)
        return negative + scale * (positive - negative)

    def step_mean(self, trained: Any, x: Any, t: int, conditions: Any) -> Any:
        rollout = self.config.rollout
        v = self.guided(trained, x, t, conditions)
        return mean(rollout.sde, self.sigmas, t, rollout.eta, x, v)

    def _rollout(self, trained: Any, conditions: Any, noise: Draws) -> list[Any]:
        """The states, [T + 1] of [B, ...]. conditions: (of the prompts, of the negative one)."""
        states, rollout = [jnp.asarray(noise.initial)], self.config.rollout
        for t in range(rollout.num_steps):
            v = self.guided(trained, states[-1], t, conditions)
            after = mean("ode", self.sigmas, t, 0.0, states[-1], v)
            if t in self.trainable:
                noisy = mean(rollout.sde, self.sigmas, t, rollout.eta, states[-1], v)
                noisy += self.stds[t] * noise.steps[t]
                chosen = self.in_window(t, noise.starts).reshape(-1, *[1] * len(self.shape))
                after = jnp.where(chosen, noisy, after)
            states.append(after)
        return states

    def log_prob(self, x: Any, mean: Any, t: int) -> Any:
        """[B], but for constants."""
        density = -((x - mean) ** 2)
        if self.config.loss.log_prob == "gaussian":
            density = density / (2 * self.stds[t] ** 2)
        return self.reduce(density)

    def reduce(self, values: Any) -> Any:
        axes = tuple(range(1, values.ndim))
        summed = self.config.loss.log_prob_reduction == "sum"
        return values.sum(axes) if summed else values.mean(axes)

    def _loss(
        self, trained: Any, old: Any, references: dict[str, Any], weight: float, data: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The loss and its parts. `old`: parameters that the ratio is taken to.

        data: (states, conditions, noise, advantages, valid).
        """
        states, conditions, noise, advantage, valid = data
        region, settings = self.config.trust_region, self.config.loss
        betas = {"anchor": region.anchor_weight, "previous": region.previous_weight}
        parts = {"policy": 0.0, "anchor": 0.0, "previous": 0.0, "clipped": 0.0, "deviation": 0.0}
        for t in self.trainable:
            counts = valid & self.in_window(t, noise.starts)
            x = states[t]
            new = self.step_mean(trained, x, t, conditions)
            # The ratio at the action that was taken, as a difference of log-probabilities
            behaviour = jax.lax.stop_gradient(self.step_mean(old, x, t, conditions))
            action = behaviour + self.stds[t] * noise.steps[t]
            log_ratio = self.log_prob(action, new, t) - self.log_prob(action, behaviour, t)
            ratio, limit = jnp.exp(log_ratio), settings.clip_range
            clipped = jnp.clip(ratio, 1 - limit, 1 + limit)

            gain = jnp.minimum(advantage * ratio, advantage * clipped)
            if settings.objective == "reinforce":
                gain = advantage * log_ratio
            parts["policy"] -= jnp.sum(jnp.where(counts, gain, 0)) * self.weights[t]
            parts["clipped"] += jnp.sum(counts & (jnp.abs(ratio - 1) > limit))
            off = jnp.max(jnp.where(counts, jnp.abs(ratio - 1), 0))
            parts["deviation"] = jnp.maximum(parts["deviation"], off)

            # KLs to the references in closed form, or Eq. 15
            for name, reference in references.items():
                gap = (new - self.step_mean(reference, x, t, conditions)) / self.stds[t]
                divergence = self.reduce(gap**2 / 2) * self.kl_weights[t]
                parts[name] += jnp.sum(jnp.where(counts, divergence, 0))
            if "previous" not in references and region.kind in ("stepwise", "dual"):
                parts["previous"] -= jnp.sum(jnp.where(counts, log_ratio, 0))

        # Means over samples and steps
        count = valid.sum() * self.window
        parts = {n: v if n == "deviation" else v / count for n, v in parts.items()}
        if settings.step_reduction == "sum":
            parts["policy"] = parts["policy"] * self.window
        kl = sum(beta * parts[name] for name, beta in betas.items())
        total = parts["policy"] + weight * kl
        return total, {**parts, "kl": kl, "total": total}

    def references(self, region: Any) -> dict[str, Any]:
        """The parameters that the KLs are taken to."""
        settings, found = self.config.trust_region, {}
        if settings.kind in ("fixed", "moving", "dual", "fixed_stepwise"):
            found["anchor"] = region["anchor"]
        closed = settings.previous_estimator == "closed_form"
        if settings.kind in ("stepwise", "dual", "fixed_stepwise") and closed:
            found["previous"] = region["previous"]
        return found


def step(
    problem: Problem,
    state: dict[str, Any],
    conditions: Any,
    noise: Draws,
    rewards: dict[str, np.ndarray],
    valid: np.ndarray,
) -> Outcome:
    """What one rollout and its updates leave.

    Args:
      problem: the constants.
      state: float64 params, mu, nu, adam_count, and the trust region's anchor, previous, weight,
        history, count, squared_norm.
      conditions: of the samples and of the negative prompt, for the velocity.
      noise: of the rollout.
      rewards: name -> [B].
      valid: bool [B].
    """
    config, old = problem.config, state["params"]
    states = problem.rollout(old, conditions, noise)
    data = (states, conditions, noise, jnp.asarray(advantages(config, rewards, valid)), valid)

    for _ in range(config.loss.updates_per_rollout):
        references = problem.references(state)
        (_, parts), grads = problem.gradient(
            state["params"], old, references, state["weight"], data
        )
        norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(grads)))
        state = _apply(
            config, jax.tree.map(np.asarray, state), grads, norm, parts, problem.elements
        )

    metrics = {
        "loss/policy": parts["policy"],
        "loss/total": parts["total"],
        "kl/total": parts["kl"],
        "grad/norm": norm,
        "ratio/clip_fraction": parts["clipped"],
        "ratio/max_deviation": parts["deviation"],
        **{f"kl/{name}": parts[name] for name in references},
    }
    return Outcome(
        params=state["params"],
        mu=state["mu"],
        nu=state["nu"],
        weight=state["weight"],
        history=state["history"],
        squared_norm=state["squared_norm"],
        metrics={name: float(value) for name, value in metrics.items()},
        videos=np.asarray(states[-1]),
    )


def _apply(config: Any, state: dict, grads: Any, norm: float, parts: Any, elements: int) -> dict:
    """Global-norm clip, AdamW, the bound on a step, then the memory of the trust region."""
    optimizer, region = config.optimizer, config.trust_region
    grads = jax.tree.map(np.asarray, grads)
    shrink = min(1.0, optimizer.grad_clip / norm)
    # AdamW
    b1, b2, n = optimizer.b1, optimizer.b2, state["adam_count"] + 1
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * shrink * g, state["mu"], grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * (shrink * g) ** 2, state["nu"], grads)

    def change(m, v, p):
        adam = (m / (1 - b1**n)) / (np.sqrt(v / (1 - b2**n)) + optimizer.eps)
        return -config.learning_rate * (adam + optimizer.weight_decay * p)

    update = jax.tree.map(change, mu, nu, state["params"])

    # The bound on a step, from the KL of the last one and the lengths of both
    squared_norm = sum(float(np.sum(u**2)) for u in jax.tree.leaves(update))
    kl, kl_previous = float(parts["kl"]) / elements, float(parts["previous"]) / elements
    if region.step_bound and state["squared_norm"] > 0 and kl_previous > 0:
        expected = kl_previous * squared_norm / state["squared_norm"]
        scale = min(1.0, math.sqrt(region.step_bound / expected))
        update = jax.tree.map(lambda u: scale * u, update)
        squared_norm *= scale**2

    # The memory of the trust region
    params = jax.tree.map(np.add, state["params"], update)
    count = state["count"] + 1
    history = np.array(state["history"])
    history[(count - 1) % region.history] = kl
    moves = region.kind in ("moving", "dual") and count % region.anchor_every == 0
    return {
        "params": params,
        "mu": mu,
        "nu": nu,
        "adam_count": n,
        "anchor": params if moves else state["anchor"],
        "previous": state["params"],
        "weight": next_weight(region, state["weight"], history, count),
        "history": history,
        "count": count,
        "squared_norm": squared_norm,
    }


def next_weight(region: Any, weight: float, history: np.ndarray, count: int) -> float:
    """Eq. 41 and 42: λ after `count` updates, the last of which had the weight `weight`."""
    if region.kind == "none":
        return 0.0
    if count <= region.warmup_steps or region.feedback == "none":
        share = min(1.0, count / region.warmup_steps) if region.warmup_steps else 1.0
        return region.initial_weight + (region.final_weight - region.initial_weight) * share
    target = region.target_shift**2 / 2
    measured = np.mean(history[: min(count, region.history)])
    high, low = (region.up, region.down)
    if region.feedback == "paper":
        high, low = low, high
    if measured > region.high * target:
        weight *= high
    elif measured < region.low * target:
        weight *= low
    return float(np.clip(weight, region.min_weight, region.max_weight))
