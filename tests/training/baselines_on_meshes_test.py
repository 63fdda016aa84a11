"""The baselines on eight devices: the same steps, noise and updates as on one."""

import dataclasses

import jax
import learners
import numpy as np
import pytest
import small_policy

from sage_grpo_jax.config import methods
from sage_grpo_jax.parallel import mesh as mesh_lib

# Adam turns the rounding of a gradient near 0 into a whole step: a large eps keeps it small.
RATE = {"optimizer.eps": 1e-3, "optimizer.learning_rate": 1e-2, "ema.decay": 0.5, "ema.every": 1}


@pytest.mark.slow  # two programs of a minute; baseline_updates_test.py has the quick one
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dance_grpo", {"rollout.guidance": 2.0, "loss.guidance_gradient": "condition"}),
        ("diffusion_nft", {"lora.rank": 2, "rollout.guidance": 2.0}),
    ],
)
def test_eight_devices_train_what_one_trains(
    make_config, local_scorer, one_device, monkeypatch, tmp_path, method, more
):
    small_policy.install(monkeypatch)
    config = make_config({**methods.METHODS[method], **RATE, **more})
    trainer = learners.make(config, local_scorer(), one_device, tmp_path)
    base = jax.tree.map(np.asarray, trainer.learner.frozen.base)
    first = trainer.steps(2)

    mesh = mesh_lib.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        on_mesh = dataclasses.replace(
            config, mesh=dataclasses.replace(config.mesh, data=2, fsdp=2, context=2)
        )
        sharded = learners.make(on_mesh, local_scorer(), mesh, tmp_path / "eight")
        assert any(not x.is_fully_replicated for x in jax.tree.leaves(sharded.state.ema))
        second = sharded.steps(2)

    for ours, theirs in zip(first, second, strict=True):
        assert ours["update/applied"] == theirs["update/applied"] == 1
        for name in ("reward/overall", "reward/group_std", "grad/norm", "loss/policy"):
            assert theirs[name] == pytest.approx(ours[name], rel=2e-3, abs=1e-6), name

    pairs = zip(
        jax.tree.leaves((trainer.state.params, trainer.state.ema, trainer.state.sampling)),
        jax.tree.leaves((sharded.state.params, sharded.state.ema, sharded.state.sampling)),
        strict=True,
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=2e-4)
    if base is not None:  # adapters: the weights under them do not move
        jax.tree.map(np.testing.assert_array_equal, base, trainer.learner.frozen.base)
        assert trainer.state.sampling.keys() == trainer.state.params.keys()
