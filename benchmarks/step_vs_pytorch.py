"""One training step of the quick start here and in eager PyTorch: rollout and update.

    JAX_PLATFORMS=cpu python benchmarks/step_vs_pytorch.py [--guidance=3 --repeats=5 --devices=1]

Both sides have the shipped moving-shapes weights, the same schedule, prompts, guidance and noise;
the PyTorch side is diffusers' HunyuanVideo15Transformer3DModel, run eagerly, with torch's AdamW.
Latents, loss and gradient norm are compared before anything is timed. The sides take turns; wall
time is the median and CPU time (all threads) the minimum over the repeats: on a busy machine
compare CPU times. As in the trainer every core is a device, unless --devices says otherwise;
PyTorch has as many threads as there are cores. Compilation is timed apart. Not in either side:
decoding, rewards. Ours draws its noise inside the rollout and again in the update; the other side
gets it for nothing.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors import torch as safetensors_torch

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.flow import noise, sde
from sage_grpo_jax.parallel import cpu_devices, sharding
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import ratio as ratio_lib
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.blueprint import Blueprint

RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "moving_shapes.py"
# Largest allowed difference between the sides: latents, then relative.
TOLERANCES = {"latents": 2e-3, "loss": 1e-3, "gradient norm": 1e-3}
NO_LIMITS = ratio_lib.Tolerances(np.float32(np.inf), np.float32(np.inf))


def make_config(args: argparse.Namespace, overrides: dict[str, Any]) -> schema.Config:
    """The quick start's recipe at the sizes of the command line."""
    # The recipe, by its path: configs/ is no package.
    spec = importlib.util.spec_from_file_location("quick_start", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()

    values.rollout.update(
        num_steps=args.steps,
        prompts_per_step=args.prompts,
        group_size=args.group,
        guidance=args.guidance,
        decode_batch=args.group,
    )
    values.loss.micro_batch = args.micro_batch
    values.update_from_flattened_dict(overrides)
    return builder.from_config_dict(values)


class Ours:
    """Rollout and update of one batch, by the trainer's own programs."""

    def __init__(self, config: schema.Config, mesh: jax.sharding.Mesh) -> None:
        blueprint = Blueprint.read(config, mesh)
        networks = blueprint.networks
        self.config, self.networks, self.mesh = config, networks, mesh
        with tempfile.TemporaryDirectory() as folder:
            prompts = prompts_lib.open_prompts(config, pathlib.Path(folder), networks)
            batch = next(iter(prompts))

        # The learner without VAE and rewards: neither is part of what is timed.
        programs = programs_lib.build(blueprint)
        self.learner = learner_lib.Learner(programs, None, prompts.negative, None)
        self.plan, self.programs = self.learner.plan, programs
        self.state = blueprint.fresh_state()
        self.prompts, self.negative = batch.repeat(config.rollout.group_size), prompts.negative
        self.condition = self.learner.condition(self.prompts)
        self.keys = self.learner.sample_keys(batch, 0)
        self.starts = self.learner.window_starts(batch, 0)

    def rollout(self) -> jax.Array:
        """The trajectory [T + 1, B, N]."""
        found = self.programs.rollout(
            self.state.params, self.condition, self.learner.frozen, self.keys, self.starts
        )
        return jax.block_until_ready(found.latents)

    def batch(self, latents: Any, advantages: np.ndarray) -> update_lib.UpdateBatch:
        """A rollout as the update sees it."""
        valid = np.ones(len(advantages), bool)
        latents = jax.device_put(np.asarray(latents), sharding.batch_sharding(self.mesh, 1))
        return update_lib.UpdateBatch(
            latents, self.keys, self.condition, advantages, valid, self.starts
        )

    def update(self, state: Any, batch: update_lib.UpdateBatch) -> dict[str, jax.Array]:
        """One update; gives `state` away."""
        return jax.block_until_ready(
            self.programs.update(state, batch, self.learner.frozen, NO_LIMITS, None)
        )[1]

    def copy_of_state(self) -> Any:
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.state))


class Theirs:
    """The same in eager PyTorch; latents are channels first [B, C, T, H, W] here."""

    def __init__(self, ours: Ours) -> None:
        self.plan, self.config = ours.plan, ours.config
        self.model = load_torch_model(ours.networks.transformer_path)
        optimizer = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

        # Our noise and our prompts, in torch's layout.
        shape = ours.plan.latent_shape
        self.first = to_torch(noise.initial_noise(ours.keys, shape))
        count = len(ours.plan.trained)
        self.noise = [to_torch(noise.step_noise(ours.keys, t, shape)) for t in range(count)]
        text, mask = ours.prompts.text, ours.prompts.mask
        negative, negative_mask = ours.negative.text, ours.negative.mask
        self.text = torch.tensor(text), torch.tensor(mask).long()
        self.negative = torch.tensor(negative), torch.tensor(negative_mask).long()

        # Both sides use the sampler's closed form; the rest is written again below.
        sigmas = np.asarray(ours.plan.schedule.sigmas, np.float64)
        rollout = self.config.rollout
        removed, std = sde.step_coefficients(
            rollout.sde, sigmas[:-1], sigmas[1:], rollout.eta, xp=np
        )
        # As in the trainer, steps that are not trained follow the ODE.
        self.sigmas, trained = sigmas, ours.plan.trained
        self.removed, self.std = np.where(trained, removed, 0), np.where(trained, std, 0)

    def velocity(self, x: torch.Tensor, t: int, rows: slice) -> torch.Tensor:
        """The guided velocity of the samples `rows` at step t."""
        text, mask = (part[rows] for part in self.text)
        scale = self.config.rollout.guidance
        if scale == 1.0:
            return self.network(x, t, text, mask)
        # Both branches in one batch, as ours.
        repeats = (len(x), *[1] * (text.ndim - 1))
        text = torch.cat([text, self.negative[0].repeat(*repeats)])
        mask = torch.cat([mask, self.negative[1].repeat(len(x), 1)])
        positive, negative = self.network(torch.cat([x, x]), t, text, mask).chunk(2)
        return negative + scale * (positive - negative)

    def network(self, x, t, text, mask) -> torch.Tensor:
        count, config = len(x), self.model.config
        timestep = float(np.asarray(self.plan.schedule.timesteps)[t])
        condition = torch.zeros(count, config.in_channels - x.shape[1], *x.shape[2:])
        return self.model(
            hidden_states=torch.cat([x, condition], 1),
            timestep=torch.full((count,), timestep),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            # The class always has these parts: one masked token of each.
            encoder_hidden_states_2=torch.zeros(count, 1, config.text_embed_2_dim),
            encoder_attention_mask_2=torch.zeros(count, 1, dtype=torch.long),
            image_embeds=torch.zeros(count, 1, config.image_embed_dim),
            return_dict=False,
        )[0]

    def mean(self, x: torch.Tensor, t: int, rows: slice = slice(None)) -> torch.Tensor:
        velocity, (sigma, sigma_next) = self.velocity(x, t, rows), self.sigmas[t : t + 2]
        # At σ the sample is data and noise: x + (1 - σ) v is its noise.
        predicted_noise = x + (1 - sigma) * velocity
        return x + (sigma_next - sigma) * velocity - self.removed[t] * predicted_noise

    @torch.no_grad()
    def rollout(self) -> list[torch.Tensor]:
        # T + 1 states from noise to data.
        states = [self.first]
        for t, draw in enumerate(self.noise):
            states.append(self.mean(states[-1], t) + self.std[t] * draw)
        return states

    def update(self, states: list[torch.Tensor], advantages: torch.Tensor) -> dict[str, float]:
        """Gradient accumulation over (step, micro-batch), clip, AdamW."""
        loss_config, total = self.config.loss, 0.0
        steps, size = np.flatnonzero(self.plan.trained), loss_config.micro_batch
        normalizer = len(steps) * len(advantages)
        self.optimizer.zero_grad(set_to_none=True)

        # Each backward pass adds to the gradient of the whole step.
        for t in steps:
            for start in range(0, len(advantages), size):
                rows = slice(start, start + size)
                draw, std = self.noise[t][rows], self.std[t]
                # The rollout's own mean, and how many std the new one is away from it.
                mean_old = states[t + 1][rows] - std * draw
                delta = (self.mean(states[t][rows], t, rows) - mean_old) / std
                ratio = (draw * delta - delta**2 / 2).mean((1, 2, 3, 4)).exp()
                clipped = ratio.clip(1 - loss_config.clip_range, 1 + loss_config.clip_range)
                gain = torch.minimum(advantages[rows] * ratio, advantages[rows] * clipped)
                loss = -(gain * float(self.plan.weights[t])).sum() / normalizer
                loss.backward()
                total += float(loss.detach())

        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.grad_clip
        )
        self.optimizer.step()
        return {"loss": total, "gradient norm": float(norm)}


def load_torch_model(folder: pathlib.Path) -> torch.nn.Module:
    """diffusers' model with the shipped weights; its unused parts keep fresh weights."""
    fields = json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    # It cannot be built without ByT5 and vision parts.
    fields["text_embed_2_dim"] = fields["text_embed_2_dim"] or 8
    fields["image_embed_dim"] = fields["image_embed_dim"] or 8
    model = diffusers.HunyuanVideo15Transformer3DModel(**fields)

    tensors = safetensors_torch.load_file(folder / "diffusion_pytorch_model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    unused = ("context_embedder_2.", "image_embedder.")
    wrong = [name for name in missing if not name.startswith(unused)] + list(unexpected)
    if wrong:
        raise ValueError(f"{folder}: tensors do not fit diffusers' class: {wrong[:3]}")
    return model


def to_torch(x: Any) -> torch.Tensor:
    """[B, T, H, W, C] -> [B, C, T, H, W]."""
    return torch.tensor(np.asarray(x)).permute(0, 4, 1, 2, 3).contiguous()


def to_ours(states: list[torch.Tensor]) -> np.ndarray:
    """Flat states [T + 1, B, N], channels last."""
    return np.stack([x.permute(0, 2, 3, 4, 1).flatten(1).numpy() for x in states])


class Times:
    """Wall and CPU seconds of repeated calls, by name."""

    def __init__(self) -> None:
        self.wall = collections.defaultdict(list)
        self.cpu = collections.defaultdict(list)

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        start, start_cpu = time.perf_counter(), time.process_time()
        result = function()
        self.wall[name].append(time.perf_counter() - start)
        self.cpu[name].append(time.process_time() - start_cpu)
        return result

    def row(self, name: str) -> tuple[float, float, float]:
        """Median wall time, minimum CPU time, and the cores that were busy (CPU over wall)."""
        cores = [c / w for c, w in zip(self.cpu[name], self.wall[name], strict=True)]
        return statistics.median(self.wall[name]), min(self.cpu[name]), max(cores)


def compare(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> None:
    """Both sides, checked and timed."""
    ours = Ours(make_config(args, {"trust_region.kind": "none"}), mesh)
    theirs = Theirs(ours)
    count = ours.config.batch_size
    advantages = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    first, times = Times(), Times()

    # Compiled and compared. Ours updates on the states of the other side: one thing differs.
    latents = first("rollout", ours.rollout)
    states = theirs.rollout()
    batch, state = ours.batch(to_ours(states), advantages), ours.copy_of_state()
    metrics = first("update", lambda: ours.update(state, batch))
    found = theirs.update(states, torch.tensor(advantages))
    check(np.asarray(latents), to_ours(states), metrics, found)

    for _ in range(args.repeats):
        state = ours.copy_of_state()
        times("rollout, here", ours.rollout)
        times("rollout, PyTorch", theirs.rollout)
        times("update, here", lambda s=state: ours.update(s, batch))
        times("update, PyTorch", lambda: theirs.update(states, torch.tensor(advantages)))

    print(f"\ncompilation: rollout {first.wall['rollout']} update {first.wall['update']} s\n")
    print("| | wall here | wall PyTorch | ratio | CPU here | CPU PyTorch | ratio | cores | cores |")
    print("|---" * 9 + "|")
    totals = np.zeros(4)
    for phase in ("rollout", "update"):
        (wall, cpu, cores), (wall_t, cpu_t, cores_t) = (
            times.row(f"{phase}, {side}") for side in ("here", "PyTorch")
        )
        totals += (wall, wall_t, cpu, cpu_t)
        print_row(phase, wall, wall_t, cpu, cpu_t, f"{cores:.2f} | {cores_t:.2f}")
    print_row("both", *totals, "| ")


def print_row(name: str, wall: float, wall_t: float, cpu: float, cpu_t: float, end: str) -> None:
    print(
        f"| {name} | {wall:.2f} s | {wall_t:.2f} s | {wall_t / wall:.2f} "
        f"| {cpu:.2f} s | {cpu_t:.2f} s | {cpu_t / cpu:.2f} | {end} |"
    )


def check(latents, wanted, metrics, found) -> None:
    """Both sides computed the same, or it is an error."""
    differences = {
        "latents": float(np.abs(latents - wanted).max()),
        "loss": abs(float(metrics["loss/total"]) / found["loss"] - 1),
        "gradient norm": abs(float(metrics["grad/norm"]) / found["gradient norm"] - 1),
    }
    print("differences:", {name: f"{value:.1e}" for name, value in differences.items()})
    for name, value in differences.items():
        if not value <= TOLERANCES[name]:
            raise SystemExit(f"error: the {name} of the sides differ by {value}")


def parser(description: str) -> argparse.ArgumentParser:
    """The sizes of a step; defaults: the quick start."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--prompts", type=int, default=8)
    result.add_argument("--group", type=int, default=8)
    result.add_argument("--steps", type=int, default=10)
    result.add_argument("--guidance", type=float, default=1.0)
    result.add_argument("--micro_batch", type=int, default=64)
    result.add_argument("--repeats", type=int, default=5)
    result.add_argument("--devices", type=int, default=-1, help="-1: one for each core, as train")
    return result


def describe(args: argparse.Namespace) -> None:
    """The conditions, for the record."""
    print(
        f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(vars(args), flush=True)


def open_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    """The devices of the trainer; to be called before any other use of JAX."""
    config = make_config(args, {})
    cpu_devices.divide((args.devices, 1, 1), lambda n: plan_lib.fits(config, n))
    describe(args)
    return mesh_lib.make_mesh(args.devices, 1, 1)


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(os.cpu_count())
    mesh = open_mesh(args)
    with jax.set_mesh(mesh):
        compare(args, mesh)


if __name__ == "__main__":
    main()
