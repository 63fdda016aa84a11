"""Gradient norms per denoising step on the pretrained moving-shapes model (Fig. 4 of the paper).

Prints the table of docs/methods.md:

    python -m pytest -s --slow tests/training/equalizer_gradient_test.py
"""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sage_grpo_jax.config import builder
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import micro_losses
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import update as update_lib
from sage_grpo_jax.training.blueprint import Blueprint

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "moving_shapes.py"


def make_learner(overrides, workdir, mesh):
    """The quick start's networks and recipe, without a trust region, and one batch of prompts."""
    spec = importlib.util.spec_from_file_location("quick_start", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()
    values.update_from_flattened_dict({"trust_region.kind": "none", **overrides})
    config = builder.from_config_dict(values)
    blueprint = Blueprint.read(config, mesh)
    prompts = prompts_lib.open_prompts(config, workdir, blueprint.networks)
    programs = programs_lib.build(blueprint)
    learner = learner_lib.Learner(programs, None, prompts.negative, None)
    return learner, blueprint.load_transformer(), next(iter(prompts))


def gradient_norms(learner, params, prompts):
    """Norms of the policy gradient of each trained step, without and with S_t; two arrays [K]."""
    plan, count = learner.plan, learner.config.batch_size
    keys, starts = learner.sample_keys(prompts, 0), learner.window_starts(prompts, 0)
    condition = learner.condition(prompts.repeat(learner.config.rollout.group_size))
    latents = learner.programs.rollout(params, condition, learner.frozen, keys, starts).latents
    advantages = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    batch = update_lib.UpdateBatch(
        latents, keys, condition, jnp.asarray(advantages), jnp.ones(count, bool), starts
    )

    @jax.jit
    def norm(position, weights):
        weighted = dataclasses.replace(plan, weights=weights)

        def loss(params):
            micro = update_lib.take_micro_batch(plan, batch, position, 0)
            inputs = micro_losses.LossInputs(learner.frozen, [], 0.0, float(count))
            return micro_losses.policy_micro_loss(params, micro, inputs, weighted)[0]

        return optax.tree.norm(jax.grad(loss)(params))

    positions = np.arange(plan.positions, dtype=np.int32)
    return tuple(
        np.array([float(norm(p, weights)) for p in positions])
        for weights in (np.ones_like(plan.weights), plan.weights)
    )


def print_table(plan, before, after):
    """One row per trained step, the spread last."""
    print("\n| step | σ → σ' | S_t | norm without | norm with S_t |\n|---|---|---|---|---|")
    sigmas = plan.schedule.sigmas
    for row, t in enumerate(np.flatnonzero(plan.trained)):
        print(
            f"| {t} | {sigmas[t]:.3f} → {sigmas[t + 1]:.3f} | {plan.weights[t]:.3f} "
            f"| {before[row]:.2e} | {after[row]:.2e} |"
        )
    print(f"| largest / smallest | | | {spread(before):.1f} | {spread(after):.2f} |")


def spread(norms):
    return norms.max() / norms.min()


def measure(overrides, workdir):
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        learner, params, prompts = make_learner(overrides, workdir, mesh)
        before, after = gradient_norms(learner, params, prompts)
    print_table(learner.plan, before, after)
    return before, after


def test_equalizer_evens_out_the_gradients(tmp_path):
    sizes = {"rollout.num_steps": 6, "rollout.prompts_per_step": 2, "rollout.group_size": 2}
    overrides = {**sizes, "loss.micro_batch": 4, "rollout.decode_batch": 4, "model.unroll": False}
    before, after = measure(overrides, tmp_path)
    assert (np.diff(before) > 0).all()  # the last steps dominate
    assert spread(before) > 20
    assert spread(after) < 2.5


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "shift", "least"), [(10, 3.0, 15), (20, 5.0, 40)])
def test_equalizer_evens_out_full_schedules(tmp_path, steps, shift, least):
    overrides = {"rollout.num_steps": steps, "rollout.shift": shift, "loss.micro_batch": 64}
    before, after = measure(overrides, tmp_path)
    assert spread(before) > least * spread(after)
