"""Prints the tables of docs/precision.md: what bfloat16 costs on the moving shapes.

    JAX_PLATFORMS=cpu python benchmarks/low_precision.py

The shipped weights in both precisions, from the same noise: the rollout (latents, videos, rewards),
the gradient, and how far the update finds the rollout, also one that it must refuse. Without remat;
about ten minutes on two CPU cores. The defaults of --settings are the quick start's guidance,
steps and shift, and those of the full recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.config import builder
from sage_grpo_jax.grpo import advantage
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.rewards.backends import moving_shapes
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import ratio
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.blueprint import Blueprint

RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "moving_shapes.py"
NO_LIMITS = ratio.Tolerances(np.float32(np.inf), np.float32(np.inf))


class Side:
    """The quick start's policy in one precision, with one batch of prompts."""

    def __init__(self, overrides: dict[str, Any], mesh: jax.sharding.Mesh) -> None:
        # The recipe, by its path: configs/ is no package.
        spec = importlib.util.spec_from_file_location("quick_start", RECIPE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        values = module.get_config()
        values.update_from_flattened_dict(overrides)
        self.config = builder.from_config_dict(values)

        # One batch of prompts, the same in both precisions.
        blueprint = Blueprint.read(self.config, mesh)
        with tempfile.TemporaryDirectory() as folder:
            prompts = prompts_lib.open_prompts(
                self.config, pathlib.Path(folder), blueprint.networks
            )
            self.batch = next(iter(prompts))

        # The programs of training, without a reward service: rewards are computed here.
        self.programs = programs_lib.build(blueprint)
        vae = blueprint.load_vae()
        self.learner = learner_lib.Learner(self.programs, vae, prompts.negative, None)
        self.state = blueprint.fresh_state()
        self.samples = self.batch.repeat(self.config.rollout.group_size)
        self.condition = self.learner.condition(self.samples)
        self.starts = self.learner.window_starts(self.batch, 0)

    def rollout(self, params: Any = None, step: int = 0) -> jax.Array:
        """The trajectory [T + 1, B, N]; another step has other noise."""
        params = self.state.params if params is None else params
        keys = self.learner.sample_keys(self.batch, step)
        return self.programs.rollout(
            params, self.condition, self.learner.frozen, keys, self.starts
        ).latents

    def rewards(self, videos: np.ndarray) -> np.ndarray:
        """The sum of the three rewards of every video; [B]."""
        backend, found = moving_shapes.MovingShapesBackend(), []
        for video, prompt in zip(videos, self.samples.prompts, strict=True):
            scores = backend.score(video, prompt, self.config.video.fps).values()
            found.append(sum(score.normalised for score in scores))
        return np.array(found)

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Within the groups; [B]."""
        table = rewards.reshape(-1, self.config.rollout.group_size)
        # The recipe's epsilon and clip.
        found = advantage.group_advantages(table, np.isfinite(table), 1e-4, 5.0)
        return np.asarray(found).reshape(-1)

    def update_batch(self, latents: Any, advantages: np.ndarray) -> update_lib.UpdateBatch:
        """A rollout as the update sees it."""
        valid, keys = np.ones(len(advantages), bool), self.learner.sample_keys(self.batch, 0)
        return update_lib.UpdateBatch(
            jnp.asarray(latents), keys, self.condition, advantages, valid, self.starts
        )

    @functools.cached_property
    def _gradients(self):
        plan = self.learner.plan
        # What the update does before its optimizer.
        return jax.jit(lambda *args: update_lib._gradients(plan, *args, None)[:2])

    def gradient(self, latents: Any, advantages: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """The gradient as one vector, and the metrics of the update."""
        batch = self.update_batch(latents, advantages)
        grads, metrics = self._gradients(self.state, batch, self.learner.frozen)
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)]).astype(np.float64)
        return flat, {name: np.asarray(value) for name, value in metrics.items()}

    def updated(self, latents: Any, advantages: np.ndarray) -> Any:
        """The parameters after one update; the side's own state stays."""
        # The update gives the buffers of its state away.
        state = jax.tree.map(jnp.copy, self.state)
        batch = self.update_batch(latents, advantages)
        limits = NO_LIMITS
        return self.programs.update(state, batch, self.learner.frozen, limits, None)[0].params


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@dataclasses.dataclass(frozen=True)
class Setting:
    guidance: float
    steps: int
    shift: float

    def __str__(self) -> str:
        return f"guidance {self.guidance:g}, T {self.steps}, shift {self.shift:g}"


def measure(setting: Setting, args: argparse.Namespace, mesh: jax.sharding.Mesh) -> None:
    # The same step in both; one micro-batch takes all samples.
    common = {
        "trust_region.kind": "none",
        "model.remat": args.remat,
        "rollout.guidance": setting.guidance,
        "rollout.num_steps": setting.steps,
        "rollout.shift": setting.shift,
        "rollout.prompts_per_step": args.prompts,
        "rollout.group_size": args.group,
        "loss.micro_batch": args.prompts * args.group,
    }

    # bfloat16 against float32 with matrix products of full precision.
    exact = Side({**common, "model.matmul_precision": "highest"}, mesh)
    coarse = Side({**common, "model.compute_dtype": "bfloat16"}, mesh)
    latents, latents_bf16 = exact.rollout(), coarse.rollout()
    print(f"\n### {setting}\n")

    # The advantages of the exact rollout for both: what is compared is the gradient.
    advantages = print_rollout(exact, coarse, latents, latents_bf16)
    print_gradients(exact, coarse, latents, latents_bf16, advantages)

    print("| update | rollout | ratio/rollout_shift | ratio/rollout_mismatch |\n|---|---|---|---|")
    print_gate("float32", exact, latents, advantages)
    print_gate("bfloat16", coarse, latents_bf16, advantages)

    _, metrics = coarse.gradient(latents_bf16, advantages)
    values = metrics["ratio/rollout_mismatch/step"]
    print("\nratio/rollout_mismatch in bfloat16, step by step: ", end="")
    print(", ".join(f"{v:.1e}" for v in values[np.isfinite(values)]), flush=True)


def print_rollout(exact: Side, coarse: Side, latents: Any, latents_bf16: Any) -> np.ndarray:
    """What the rollout's rounding does to videos and rewards; the advantages in float32."""
    # The rounding of the transformer alone, of the VAE alone, and of both.
    videos = exact.learner.scoring.decode(latents[-1])
    mixed, videos_bf16 = (
        exact.learner.scoring.decode(latents_bf16[-1]),
        coarse.learner.scoring.decode(latents[-1]),
    )
    both = coarse.learner.scoring.decode(latents_bf16[-1])

    # Judged by the same rewards, and by the advantages that come of them.
    rewards = exact.rewards(videos)
    advantages = exact.advantages(rewards)
    spread = rewards.reshape(-1, exact.config.rollout.group_size).std(axis=1).mean()
    print(f"mean reward {rewards.mean():+.3f}, standard deviation in a group {spread:.3f}\n")
    print(
        "| bfloat16 in | latents (relative) | pixels (of 255) | reward, mean | reward, each "
        "| cosine of the advantages |\n|---|---|---|---|---|---|"
    )

    rows = {"transformer": mixed, "VAE": videos_bf16, "both": both}
    for name, found in rows.items():
        other = exact.rewards(found)
        distance = 0.0 if name == "VAE" else rms(latents_bf16[-1] - latents[-1]) / rms(latents[-1])
        pixels = np.abs(found.astype(float) - videos).mean()
        print(
            f"| {name} | {distance:.4f} | {pixels:.2f} | {np.mean(other - rewards):+.4f} "
            f"| {np.abs(other - rewards).mean():.4f} "
            f"| {cosine(exact.advantages(other), advantages):.4f} |"
        )
    print(flush=True)
    return advantages


def print_gradients(
    exact: Side, coarse: Side, latents: Any, latents_bf16: Any, advantages: np.ndarray
) -> None:
    """Of the same advantages: cosine and length against float32."""
    # The truth: float32 update, float32 rollout.
    wanted, _ = exact.gradient(latents, advantages)
    print("| gradient | cosine | length | max abs(ratio - 1) | clipped |\n|---|---|---|---|---|")
    rows = {
        "bfloat16 update, float32 rollout": (coarse, latents),
        "float32 update, bfloat16 rollout": (exact, latents_bf16),
        "both bfloat16": (coarse, latents_bf16),
    }
    for name, (side, states) in rows.items():
        found, metrics = side.gradient(states, advantages)
        length = np.linalg.norm(found) / np.linalg.norm(wanted)
        print(
            f"| {name} | {cosine(found, wanted):.4f} | {length:.4f} "
            f"| {metrics['ratio/max_deviation']:.1e} | {metrics['ratio/clip_fraction']:.2f} |"
        )
    print(flush=True)


def print_gate(name: str, side: Side, latents: Any, advantages: np.ndarray) -> None:
    """What the gate sees of a good rollout and of those that it is there for."""
    # Besides its own rollout: policies that are a little off, and another noise.
    later = side.updated(latents, advantages)
    noise = np.random.default_rng(0)
    shaken = jax.tree.map(
        lambda x: x + 0.02 * np.std(x) * noise.standard_normal(x.shape).astype(np.float32),
        side.state.params,
    )
    rollouts = {
        "its own": latents,
        "of the policy one update later": side.rollout(later),
        "of weights with 2 % of noise": side.rollout(shaken),
        "with other noise": side.rollout(step=1),
    }
    for what, states in rollouts.items():
        _, metrics = side.gradient(states, advantages)
        shift, mismatch = (metrics[f"ratio/rollout_{n}"] for n in ("shift", "mismatch"))
        print(f"| {name} | {what} | {shift:.1e} | {mismatch:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["1,10,3", "6,20,5"],
        metavar="GUIDANCE,STEPS,SHIFT",
    )
    args = parser.parse_args()
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        for text in args.settings:
            guidance, steps, shift = text.split(",")
            measure(Setting(float(guidance), int(steps), float(shift)), args, mesh)


if __name__ == "__main__":
    main()
