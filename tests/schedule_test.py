"""What the schedule command prints, against the reference table of the algorithm."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*flags: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sage_grpo_jax.schedule", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=ROOT)


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
        "--config=configs/moving_shapes.py:method=cps", "--config.rollout.eta=1.5", check=False
    )
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: config.rollout.eta: got 1.5")
