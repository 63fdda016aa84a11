"""What the schedule command prints, against the reference table of the algorithm."""

import json
import pathlib

import numpy as np
import pytest
from entry_process import Result, run_all

from sage_grpo_jax.config import builder, schema, step_plan
from sage_grpo_jax.flow import excess, injected_noise, schedules, sde

ROOT = pathlib.Path(__file__).parents[1]


def run(*flags: str, status: int = 0) -> Result:
    (result,) = run_all([["schedule", *flags]], ROOT)
    assert result.status == status, result
    return result


@pytest.fixture(scope="module")
def full_size() -> dict:
    return json.loads(run("--config=configs/hunyuan_video_15.py", "--json").stdout)


@pytest.mark.parametrize(
    ("step", "std", "weight"),
    [
        (0, 1.112, 8.16), (1, 0.851, 5.30), (5, 0.466, 1.95), (9, 0.379, 1.0), (14, 0.328, 0.397),
    ],
)  # fmt: skip
def test_values_of_the_full_size_recipe(full_size, step, std, weight):
    assert full_size["std"][step] == pytest.approx(0.5 * std, abs=5e-4)
    assert full_size["S"][step] == pytest.approx(weight, rel=5e-3)


def test_the_equalizer_gives_every_trained_step_the_same_share(full_size):
    np.testing.assert_allclose(full_size["share"][:-1], 1 / 19, rtol=1e-5)
    assert full_size["share"][-1] == full_size["std"][-1] == 0
    assert full_size["trained_steps"] == 19


def plan(**rollout) -> schema.Config:
    config = schema.default_config()
    config.rollout.update(num_steps=10, shift=3.0)
    kind, eta = rollout.pop("match", ("", 0.0))
    config.rollout.eta_match.update(kind=kind, eta=eta)
    config.rollout.update(rollout)
    return builder.from_config_dict(config)


def injected_variance(config: schema.Config) -> float:
    """Over every place of the window, with all steps in it where the recipe trains them."""
    plan, rollout = step_plan.plan_steps(config), config.rollout
    sigmas = np.asarray(plan.schedule.sigmas, np.float64)
    std = sde.step_coefficients(rollout.sde, sigmas[:-1], sigmas[1:], rollout.eta, xp=np).std
    # Up to the last step, where that injects noise.
    steps = np.flatnonzero(std)[: None if rollout.last_step == "stochastic" else -1]
    if rollout.last_step == "deterministic" and std[-1] == 0:
        steps = np.flatnonzero(std)
    positions = rollout.window_size or len(steps)
    count = len(steps) - positions + 1 if rollout.window == "random_k" else 1
    places = [steps[s : s + positions] for s in range(count)]
    return float(np.mean([np.sum(std[place] ** 2) for place in places]))


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"window": "first_k", "window_size": 3},
        {"window": "random_k", "window_size": 3},
        {"window": "first_k", "window_size": 10, "last_step": "stochastic", "sde": "dance"},
    ],
)
@pytest.mark.parametrize("match", [("flow", 0.7), ("cps", 0.3)])
def test_matched_noise_is_that_of_the_steps_in_the_window(window, match):
    if window.get("last_step") and match[0] == "cps":
        window = window | {"window_size": 9}  # cps has no noise in the last step
    kind, eta = match
    wanted = injected_variance(plan(**window | {"sde": kind, "eta": eta}))
    assert injected_variance(plan(match=match, **window)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.5, 7.0])
def test_an_eta_that_is_replaced_is_not_checked(eta):
    config = plan(sde="cps", eta=eta, match=("flow", 0.2))
    assert config.rollout.eta == pytest.approx(0.1194, abs=1e-4)


def test_matches_that_need_too_large_an_eta_are_refused():
    with pytest.raises(ValueError, match=r"config\.rollout\.eta_match") as error:
        plan(sde="dance", match=("flow", 2.0))
    assert str(error.value) == (
        "config.rollout.eta_match: kind='flow' with eta=2.0 needs rollout.eta = 4.709 with "
        "sde='dance'; allowed: an eta of at most 2"
    )
    # The eta that is named gives just as much noise.
    schedule = schedules.host_schedule(10, 3.0)
    assert injected_noise.injected_variance("dance", schedule, 4.709) == pytest.approx(
        injected_noise.injected_variance("flow", schedule, 2.0), rel=1e-3
    )
    with pytest.raises(ValueError, match=r"config.rollout.eta_match: kind='cps' injects .* most"):
        plan(sde="cps", match=("flow", 2.0))


def test_matches_without_a_stochastic_step_are_refused():
    with pytest.raises(ValueError, match=r"^config.rollout: num_steps=1, .* no stochastic step"):
        plan(num_steps=1, match=("flow", 0.5))
    with pytest.raises(ValueError, match=r"^config.rollout.eta_match: kind='cps' with eta=0.5 has"):
        plan(num_steps=1, last_step="stochastic", match=("cps", 0.5))
    with pytest.raises(ValueError, match=r"sde='ode' .* samples without noise"):
        plan(sde="ode", match=("flow", 0.5))


def test_a_random_window_is_printed_as_the_mean_over_its_places():
    flags = ("--config=configs/moving_shapes.py", "--config.rollout.num_steps=20")
    flags += ("--config.rollout.shift=5", "--config.rollout.window=random_k")
    flags += ("--config.rollout.window_size=3", "--config.rollout.eta=0.5")
    found = json.loads(run(*flags, "--json").stdout)
    # Every place by itself: 3 of the 19 steps with noise.
    schedule = schedules.host_schedule(20, 5.0)
    masks = [(np.arange(20) >= start) & (np.arange(20) < start + 3) for start in range(17)]
    chains = [excess.point_mass("precise", schedule, 0.5, mask) for mask in masks]
    variance = np.mean([np.sum(chain.stds**2) for chain in chains])
    assert found["injected_std"] == pytest.approx(np.sqrt(variance), rel=1e-9)
    np.testing.assert_allclose(found["excess"], np.mean([c.excess for c in chains], 0), rtol=1e-9)
    counts = np.sum(masks, axis=0)
    np.testing.assert_allclose(found["coverage"], counts / 17)
    # With the equalizer every step of a window has the same gradient.
    np.testing.assert_allclose(found["share"], counts / 51, rtol=1e-5)
    assert found["trained_steps"] == 3
    lines = run(*flags).stdout.splitlines()
    assert lines[1].startswith("expected over the 17 places of the random window")
    assert lines[2].endswith("covered")
    assert lines[-2].split()[-2:] == ["2.0%", "5.9%"]


def test_a_moving_window_is_printed_as_the_mean_over_the_rollouts():
    flags = ("--config=configs/moving_shapes.py", "--config.rollout.window=decay")
    flags += ("--config.rollout.window_size=4", "--config.rollout.window_motion.stay=6")
    flags += ("--config.rollout.window_motion.stride=2", "--config.rollout.clamp=0.02")
    flags += ("--config.rollout.eta=0.5",)
    found = json.loads(run(*flags, "--json").stdout)
    # 9 steps inject noise; the window is at 0, 2 and 4 for 6, floor(6·7/9 + 2/9) and
    # floor(6·5/9 + 4/9) rollouts.
    masks = np.zeros((3, 10))
    for place in range(3):
        masks[place, 2 * place : 2 * place + 4] = 1
    coverage = np.array([6, 4, 3]) @ masks / 13
    np.testing.assert_allclose(found["coverage"], coverage)
    np.testing.assert_allclose(found["trained"], coverage)
    sigmas = np.asarray(schedules.host_schedule(10, 3.0).sigmas, np.float64)
    start, end = np.maximum(1 - sigmas[:-1], 0.02), np.maximum(1 - sigmas[1:], 0.02)
    variance = 0.25 * (np.log(end / start) - (end - start))
    assert found["injected_std"] == pytest.approx(np.sqrt(coverage @ variance), rel=1e-6)
    assert found["std"][0] == pytest.approx(np.sqrt(variance[0]), rel=1e-6)
    lines = run(*flags).stdout.splitlines()
    assert lines[1].startswith("expected over the 3 places of the decay window")
    assert lines[3].split()[-1] == "46.2%"


def test_steps_that_inject_noise_and_are_not_trained():
    found = json.loads(run("--config=configs/moving_shapes.py:method=dance_grpo", "--json").stdout)
    np.testing.assert_allclose(found["coverage"], [1.0] * 9 + [0.0])
    np.testing.assert_allclose(found["trained"], [5 / 9] * 9 + [0.0])
    assert found["trained_steps"] == 5
    found = json.loads(run("--config=configs/moving_shapes.py:method=flow_grpo", "--json").stdout)
    np.testing.assert_allclose(found["coverage"], 1.0)
    np.testing.assert_allclose(found["trained"], [1.0] * 9 + [0.0])
    assert found["std"][9] > 0.2
    assert found["S"][9] == found["share"][9] == 0
    text = run("--config=configs/moving_shapes.py:method=diffusion_nft").stdout
    assert "injected std 0 " in text
    assert text.splitlines()[2].split()[-1] == "trained"
    assert {line.split()[-1] for line in text.splitlines()[3:]} == {"90.0%"}


def test_matched_noise_is_printed_and_impossible_recipes_are_refused():
    flags = ("--config=configs/moving_shapes.py", "--config.rollout.eta_match.kind=flow")
    text = run(*flags, "--config.rollout.eta_match.eta=0.7").stdout
    # sqrt of the summed variances of flow over T = 10, shift 3, without the last step.
    u = np.linspace(1, 0, 11)
    sigma = 3 * u / (1 + 2 * u)
    near = np.where(np.arange(10) == 0, sigma[1], sigma[:-1])
    variance = 0.49 * sigma[:-1] / (1 - near) * (sigma[:-1] - sigma[1:])
    assert f"injected std {np.sqrt(variance[:-1].sum()):.4g}" in text
    refused = run(
        "--config=configs/moving_shapes.py:method=cps", "--config.rollout.eta=1.5", status=2
    )
    assert refused.stderr.strip().splitlines()[-1].startswith("error: config.rollout.eta: got 1.5")
