import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sage_grpo_jax.grpo import trust_region as tr


def make_params():
    return {"layer": {"w": jnp.arange(6.0).reshape(2, 3)}, "bias": jnp.ones(3)}


def make_optimizer(config):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), tr.trust_region(config))


def make_step(optimizer):
    """One update with gradients and a KL that change from step to step."""

    def step(params, state, kl):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p) + kl, params)
        updates, state = optimizer.update(grads, state, params, kl=kl)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def to_numpy(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def buffers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", tr.REFERENCE_DTYPES)
def test_trace_of_a_dual_trust_region(dtype):
    """25 updates with donation against references kept by hand."""
    config = tr.TrustRegionConfig(
        "dual",
        anchor_every=4,
        warmup_steps=5,
        initial_weight=0.0,
        final_weight=1.0,
        history=3,
        reference_dtype=dtype,
    )

    def rounded(tree):
        return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)

    def assert_equal(found, kept):
        jax.tree.map(np.testing.assert_array_equal, to_numpy(found), rounded(kept))
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}

    optimizer = make_optimizer(config)
    step = make_step(optimizer)
    params = make_params()
    state = optimizer.init(params)
    anchor = previous = to_numpy(params)
    for k in range(1, 26):
        before = to_numpy(params)
        params, state = step(params, state, jnp.float32(1e-4))
        previous = before
        if k % 4 == 0:
            anchor = to_numpy(params)
        region = tr.find_state(state)
        assert region.count == k
        assert_equal(region.previous, previous)
        assert_equal(region.anchor, anchor)
        np.testing.assert_allclose(region.weight, min(k / 5, 1.0), rtol=1e-6)
    # What is trained keeps its own precision.
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("feedback", tr.FEEDBACKS)
def test_trace_of_the_weight(feedback):
    """Warm-up, then feedback on the mean of the last H KLs, in plain Python."""
    config = tr.TrustRegionConfig(
        "stepwise",
        warmup_steps=3,
        initial_weight=0.1,
        final_weight=0.4,
        min_weight=0.3,
        max_weight=0.6,
        target_shift=2**0.5,
        history=4,
        feedback=feedback,
    )
    transform = tr.trust_region(config)
    update = jax.jit(lambda state, kl: transform.update(make_params(), state, make_params(), kl=kl))
    kls = [0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.1] + [1.0] * 4 + [5.0] * 8 + [0.2] * 12
    state = transform.init(make_params())
    weight, factors = 0.1, {"tighten": (1.1, 0.9), "paper": (0.9, 1.1), "none": (1.0, 1.0)}
    if_high, if_low = factors[feedback]
    assert state.weight == np.float32(0.1)
    reached = set()
    for count, kl in enumerate(kls, start=1):
        updates, state = update(state, kl)
        jax.tree.map(np.testing.assert_array_equal, updates, make_params())
        mean = np.mean(kls[max(0, count - 4) : count])
        if count <= 3:
            weight = 0.1 + 0.3 * count / 3
        else:
            weight *= if_high if mean > 1.5 else if_low if mean < 0.5 else 1.0
            weight = min(max(weight, 0.3), 0.6)
        reached.add(round(weight, 6))
        np.testing.assert_allclose(state.weight, weight, rtol=1e-5)
        assert state.history[(count - 1) % 4] == np.float32(kl)
    assert feedback == "none" or {0.3, 0.6} <= reached


def test_without_warm_up_feedback_starts_at_once():
    config = tr.TrustRegionConfig(
        "fixed", warmup_steps=0, initial_weight=0.0, final_weight=1.0, target_shift=2**0.5
    )
    transform = tr.trust_region(config)
    state = transform.init(make_params())
    assert state.weight == 1
    _, state = transform.update(make_params(), state, make_params(), kl=2.0)
    assert state.weight == np.float32(1.1)


@pytest.mark.parametrize("kind", tr.KINDS)
def test_kinds_keep_and_offer_the_references_they_need(kind):
    config = tr.TrustRegionConfig(
        kind, anchor_every=2, anchor_weight=0.7, previous_weight=0.2, warmup_steps=0
    )
    optimizer = make_optimizer(config)
    step, params = make_step(optimizer), make_params()
    state = optimizer.init(params)
    history = [to_numpy(params)]
    for _ in range(5):
        params, state = step(params, state, jnp.float32(0.0))
        history.append(to_numpy(params))
    want = {
        "none": [],
        "fixed": [("anchor", 0, 0.7)],
        "stepwise": [("previous", 4, 0.2)],
        "moving": [("anchor", 4, 0.7)],
        "dual": [("anchor", 4, 0.7), ("previous", 4, 0.2)],
        "fixed_stepwise": [("anchor", 0, 0.7), ("previous", 4, 0.2)],
    }[kind]
    region = tr.find_state(state)
    got = tr.references(region, config)
    assert [(reference.name, reference.beta) for reference in got] == [(n, b) for n, _, b in want]
    for reference, (_, age, _) in zip(got, want, strict=True):
        jax.tree.map(np.testing.assert_array_equal, to_numpy(reference.params), history[age])
    assert len(jax.tree.leaves((region.anchor, region.previous))) == 2 * len(want)
    assert (region.weight == 0) == (kind == "none")


@pytest.mark.parametrize("jit_init", [False, True])
def test_no_aliases_so_that_everything_can_be_donated(jit_init):
    config = tr.TrustRegionConfig("dual", anchor_every=2)
    optimizer = make_optimizer(config)
    step, params = make_step(optimizer), make_params()
    state = (jax.jit(optimizer.init) if jit_init else optimizer.init)(params)
    for _ in range(4):
        pointers = buffers((params, state))
        assert len(set(pointers)) == len(pointers)
        params, state = step(params, state, jnp.float32(1e-3))
    # Outside of jit too.
    _, state = optimizer.update(make_params(), state, params, kl=0.0)
    pointers = buffers((params, state))
    assert len(set(pointers)) == len(pointers)


def test_penalty_damps_the_motion():
    """At θ_{k+1} the KL to the previous parameters pulls back towards θ_k."""
    config = tr.TrustRegionConfig("stepwise", previous_weight=1.0)
    optimizer = optax.chain(optax.sgd(0.1), tr.trust_region(config))
    params = {"x": jnp.zeros(2)}
    state = optimizer.init(params)

    def kl(params, state):
        (previous,) = tr.references(tr.find_state(state), config)
        return 0.5 * jnp.sum((params["x"] - previous.params["x"]) ** 2)

    def step(params, state):
        value, penalty = jax.value_and_grad(kl)(params, state)
        grads = {"x": -jnp.ones(2) + 5.0 * penalty["x"]}
        updates, state = optimizer.update(grads, state, params, kl=value)
        return optax.apply_updates(params, updates), state

    positions = [0.0]
    for _ in range(3):
        params, state = step(params, state)
        positions.append(float(params["x"][0]))
    # Steps of .1·(1 - 5·last step): .1, .05, .075.
    np.testing.assert_allclose(np.diff(positions), [0.1, 0.05, 0.075], rtol=1e-5)


def test_find_state_and_missing_arguments():
    config = tr.TrustRegionConfig("dual")
    optimizer = make_optimizer(config)
    state = optimizer.init(make_params())
    assert isinstance(tr.find_state(state), tr.TrustRegionState)
    with pytest.raises(ValueError, match="holds 0"):
        tr.find_state(optax.adamw(1e-3).init(make_params()))
    with pytest.raises(ValueError, match="holds 2"):
        tr.find_state((state, state))
    transform, region = tr.trust_region(config), tr.find_state(state)
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update(make_params(), region, kl=0.0)
    with pytest.raises(ValueError, match="needs kl for kind='dual'"):
        transform.update(make_params(), region, make_params())
    free = tr.trust_region(tr.TrustRegionConfig("none"))
    _, state = free.update(make_params(), free.init(make_params()), make_params())
    assert state.count == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "double", "none, fixed"),
        ("feedback", "loosen", "tighten, paper, none"),
        ("anchor_every", 0, "at least 1"),
        ("history", 2.5, "int"),
        ("history", True, "int"),
        ("warmup_steps", -1, "at least 0"),
        ("warmup_steps", "1", "float"),
        ("previous_weight", -0.1, "at least 0"),
        ("anchor_weight", float("nan"), "at least 0"),
        ("max_weight", float("inf"), "finite"),
        ("target_shift", 0.0, "greater than 0"),
        ("high", 0.1, "greater than low"),
        ("up", 0.9, "at least 1"),
        ("down", 1.5, "0 to 1, but greater than 0"),
        ("max_weight", 0.0, "at least min_weight"),
        ("final_weight", 1e9, "min_weight to max_weight, 0.001 to 30.0"),
    ],
)
def test_config_names_field_value_and_what_is_allowed(field, value, message):
    named = rf"^TrustRegionConfig.{field}: got {value!r}( \(\w+\))?; allowed: {message}"
    with pytest.raises(ValueError, match=named):
        tr.TrustRegionConfig(**{field: value})


def test_a_warm_up_may_end_within_an_update():
    config = tr.TrustRegionConfig(
        "moving", warmup_steps=2.5, initial_weight=0.1, final_weight=0.6, feedback="none"
    )
    transform, params = tr.trust_region(config), make_params()
    state = transform.init(params)
    weights = [float(state.weight)]
    for _ in range(4):
        _, state = transform.update(params, state, params, kl=0.0)
        weights.append(float(state.weight))
    np.testing.assert_allclose(weights, [0.1, 0.3, 0.5, 0.6, 0.6], rtol=1e-6)


@pytest.mark.parametrize("kind", tr.KINDS)
def test_the_weight_of_a_fixed_anchor(kind):
    config = tr.TrustRegionConfig(kind, fixed_weight=0.3, warmup_steps=5.0, history=1)
    given = config.with_fixed_weight()
    if kind not in ("fixed", "fixed_stepwise"):
        assert given is config
        return
    transform, params = tr.trust_region(given), make_params()
    state = transform.init(params)
    for kl in (0.0, 100.0, 100.0, 0.0):
        assert state.weight == np.float32(0.3)
        _, state = transform.update(params, state, params, kl=kl)
    assert (given.kind, given.anchor_weight) == (kind, config.anchor_weight)


def test_step_bound_scales_an_update_to_the_expected_kl():
    """On a quadratic KL the bound is met exactly, whatever the update asks for."""
    bound = 1e-3
    config = tr.TrustRegionConfig("stepwise", feedback="none", step_bound=bound)
    optimizer = tr.trust_region(config)
    params = {"w": jnp.zeros(4)}
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    kl, lengths = 0.0, []
    for k in range(6):
        wanted = (3.0**k) * 0.01 * rng.standard_normal(4).astype(np.float32)
        updates, state = optimizer.update({"w": wanted}, state, params, kl=kl, kl_previous=kl)
        step = np.asarray(updates["w"], np.float64)
        # KL = |step|² / 2, as for the mean of a unit Gaussian.
        kl = float(np.sum(step**2) / 2)
        lengths.append(np.linalg.norm(step) / np.linalg.norm(wanted))
        if k > 0:
            assert kl <= bound * (1 + 1e-5)
    assert lengths[0] == pytest.approx(1)  # nothing is known before the first step
    assert lengths[-1] < 0.1
    assert kl == pytest.approx(bound, rel=1e-5)
    np.testing.assert_allclose(state.squared_norm, 2 * kl, rtol=1e-5)


def test_log_ratio_estimator_keeps_no_parameters():
    config = tr.TrustRegionConfig("dual", previous_estimator="log_ratio")
    state = tr.trust_region(config).init(make_params())
    assert state.previous is None
    assert [r.name for r in tr.references(state, config)] == ["anchor"]
    with pytest.raises(ValueError, match="step_bound"):
        tr.TrustRegionConfig("dual", previous_estimator="log_ratio", step_bound=1e-3)
    with pytest.raises(ValueError, match="step_bound"):
        tr.TrustRegionConfig("moving", step_bound=1e-3)


@pytest.mark.parametrize(("multiple", "factor"), [(5.0, 1.1), (1.0, 1.0), (0.3, 0.9)])
def test_feedback_acts_around_the_target(multiple, factor):
    """The target is d²/2 of the shift d; only multiples of it count, however small it is."""
    config = tr.TrustRegionConfig(
        "moving",
        initial_weight=1.0,
        final_weight=1.0,
        warmup_steps=0,
        target_shift=0.02,
        history=1,
        up=1.1,
        down=0.9,
    )
    transform, params = tr.trust_region(config), make_params()
    _, state = transform.update(params, transform.init(params), params, kl=multiple * 0.02**2 / 2)
    assert state.weight == pytest.approx(factor)
