import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.models import hunyuan_video, lora
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import optimizers
from sage_grpo_jax.training.blueprint import Blueprint


def make_config(**overrides) -> schema.Config:
    config = schema.default_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    config.rewards.update(spawn=True)
    return builder.from_config_dict(config)


def rates(config, steps: int) -> list[float]:
    schedule = optimizers.learning_rate(config)
    return [float(schedule(step)) for step in range(steps)]


def test_learning_rate_schedules_by_hand():
    base = {"optimizer__learning_rate": 1.0, "num_steps": 10}
    assert rates(make_config(**base), 12) == [1.0] * 12
    warm = make_config(**base, optimizer__warmup_steps=3)
    np.testing.assert_allclose(rates(warm, 5), [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
    linear = make_config(**base, optimizer__schedule="linear", optimizer__final_fraction=0.5)
    np.testing.assert_allclose(rates(linear, 11), np.linspace(1, 0.5, 11), rtol=1e-6)
    cosine = make_config(**base, optimizer__schedule="cosine", optimizer__warmup_steps=2)
    expected = 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8))
    np.testing.assert_allclose(rates(cosine, 11)[2:], expected, atol=1e-6)
    adapters = make_config(**base, lora__rank=2, lora__learning_rate=0.125)
    assert rates(adapters, 2) == [0.125] * 2


def test_total_steps_are_those_of_the_optimizer():
    linear = make_config(
        optimizer__learning_rate=1.0, optimizer__schedule="linear", num_steps=4,
        loss__updates_per_rollout=2,
    )  # fmt: skip
    np.testing.assert_allclose(rates(linear, 9), np.linspace(1, 0, 9), atol=1e-6)


def test_adamw_by_hand():
    """Two updates in float64: clip, moments, bias correction, decay, the rate of each update."""
    config = make_config(
        optimizer__learning_rate=0.1, optimizer__warmup_steps=1, optimizer__b1=0.7,
        optimizer__b2=0.9, optimizer__eps=0.05, optimizer__weight_decay=0.3,
        optimizer__grad_clip=2.0, trust_region__kind="none",
    )  # fmt: skip
    tx = optimizers.make_optimizer(config)
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
    state, grads = tx.init(params), [np.array([3.0, -4.0, 0.0]), np.array([0.3, 0.4, -1.0])]

    x, first, second = np.array([1.0, -2.0, 0.5]), 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(grads, (0.05, 0.1), strict=True), start=1):
        tree = {"a": jnp.asarray(gradient[:2], jnp.float32), "b": jnp.full((1, 1), gradient[2])}
        updates, state = tx.update(tree, state, params)
        params = optax.apply_updates(params, updates)
        clipped = gradient * min(1, 2.0 / np.linalg.norm(gradient))
        first = 0.7 * first + 0.3 * clipped
        second = 0.9 * second + 0.1 * clipped**2
        step = (first / (1 - 0.7**t)) / (np.sqrt(second / (1 - 0.9**t)) + 0.05)
        x = x - rate * (step + 0.3 * x)
        found = np.concatenate([params["a"], params["b"][0]])
        np.testing.assert_allclose(found, x, rtol=1e-5)


def matrices(params) -> set[str]:
    """Names of the parameters that Muon takes, by what is left out of its state."""
    flat = traverse_util.flatten_dict(
        optimizers.muon_dimensions(params), is_leaf=lambda _, x: not isinstance(x, dict)
    )
    return {"/".join(path) for path, numbers in flat.items() if numbers is not None}


def test_muon_takes_every_matrix_and_nothing_else():
    """Leaf by leaf at the full size: kernels and the type embedding; no bias, no norm scale."""
    config = hunyuan_video.HunyuanVideoConfig(use_meanflow=True)
    params = jax.eval_shape(lambda: hunyuan_video.init_params(config, jax.random.key(0)))
    names = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(params).items()}
    expected = {name for name in names if name.endswith("/kernel")} | {"cond_type_embed"}
    assert matrices(params) == expected
    assert all(name.rpartition("/")[2] in ("bias", "scale") for name in names.keys() - expected)
    numbers = traverse_util.flatten_dict(
        optimizers.muon_dimensions(params), is_leaf=lambda _, x: not isinstance(x, dict)
    )
    assert numbers["blocks", "image", "query", "kernel"] == ((1,), (2,))
    assert numbers["patch_embed", "kernel"] == ((0, 1, 2, 3), (4,))
    adapters = lora.abstract_adapters(params, lora.LoraConfig(rank=4, alpha=4.0), hunyuan_video)
    assert len(matrices(adapters)) == 24


def test_muon_makes_every_layer_orthogonal_by_itself():
    """Against Newton-Schulz in float64, a layer at a time, with the scale 0.2 √max(in, out)."""
    rng = np.random.default_rng(0)
    weights = {"blocks": {"proj": {"kernel": rng.standard_normal((3, 6, 4)).astype(np.float32)}}}
    grads = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), weights)
    config = make_config(
        optimizer__name="muon", optimizer__learning_rate=1.0, optimizer__grad_clip=1e9,
        optimizer__momentum=0.0, trust_region__kind="none",
    )  # fmt: skip
    tx = optimizers.make_optimizer(config)
    updates, _ = tx.update(grads, tx.init(weights), weights)
    for layer in range(3):
        g = grads["blocks"]["proj"]["kernel"][layer].astype(np.float64)
        x = g / np.linalg.norm(g)
        for _ in range(5):
            a = x.T @ x
            x = 3.4445 * x + x @ (-4.775 * a + 2.0315 * a @ a)
        got = updates["blocks"]["proj"]["kernel"][layer]
        np.testing.assert_allclose(got, -0.2 * np.sqrt(6) * x, atol=2e-3)


def test_muon_state_is_sharded_like_its_parameters(tiny_overrides):
    config = schema.default_config()
    config.update_from_flattened_dict({**tiny_overrides, "optimizer.name": "muon"})
    config = builder.from_config_dict(config)
    state = Blueprint.read(config, mesh_lib.make_mesh(2, 2, 2)).state
    by_path = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    want = state.params["blocks"]["image"]["query"]["kernel"].sharding
    assert not want.is_fully_replicated
    found = [k for k in by_path if k.endswith("['blocks']['image']['query']['kernel']")]
    # Momentum, anchor and previous; no second moment for a matrix.
    assert len(found) == 3
    assert all(by_path[k].sharding == want for k in found)


@pytest.mark.parametrize(("ratio", "warned"), [(3.0, True), (1e4, False), (0.0, False)])
def test_gradients_near_eps_are_told(ratio, warned):
    text = optimizers.warn_about_epsilon(ratio, 1e-8)
    assert (text is not None) == warned
    if warned:
        assert "3 times config.optimizer.eps = 1e-08" in text


def test_trust_region_of_the_chain_bounds_what_is_applied():
    """The bound acts on the update that AdamW made, not on the gradient."""
    config = make_config(
        trust_region__kind="stepwise", trust_region__step_bound=1e-6, optimizer__learning_rate=0.1
    )
    tx = optimizers.make_optimizer(config)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    sizes = []
    for _ in range(2):
        grads = {"w": jnp.array([1.0, -2.0, 3.0])}
        updates, state = tx.update(grads, state, params, kl=1e-4, kl_previous=1e-4)
        sizes.append(float(optax.tree.norm(updates)))
    assert sizes[1] == pytest.approx(0.1 * sizes[0], rel=1e-2)
