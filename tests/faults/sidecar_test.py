"""A reward service that misbehaves: samples are masked, updates skipped, the run stops and goes on.

Death and restart of a sidecar, and that none outlives its trainer, are in tests/training/loop_test
and tests/rewards/{spawn,supervisor}_test.
"""

import os
import signal

import numpy as np
import pytest
from scripted_service import Script, scripted

from sage_grpo_jax.training import loop, reward_service, scoring

REMOTE = {
    "rewards.spawn": False,
    "rewards.timeout_seconds": 0.5,
    "rewards.budget_seconds": 0.8,
    "rewards.max_skipped_updates": 2,
}


@pytest.fixture
def service(runs, monkeypatch):
    """A faulty service that the run reaches through the real client; its address is filled in."""
    service = Script()
    monkeypatch.setattr(loop, "open_scorer", runs.open_scorer)
    with scripted(service) as address:
        service.settings = {**REMOTE, "rewards.address": address}
        yield service


@pytest.mark.parametrize(
    "faults",
    [
        ("nan", "wrong request"),
        ("incomplete", "slow"),
        pytest.param(("failed", "wrong video"), marks=pytest.mark.slow),
    ],
)
def test_half_of_the_samples_failing_skips_stops_and_goes_on(runs, service, tmp_path, faults):
    service.fault = lambda phase, sample: (
        faults[sample] if phase in ("step1", "step2") and sample < 2 else ""
    )
    with pytest.raises(loop.TooManySkipsError) as error:
        runs.train(tmp_path, **{**service.settings, "num_steps": 4})
    assert str(error.value).startswith(
        "2 updates in a row were skipped (config.rewards.max_skipped_updates = 2); the last one "
        "because only 50 % of the samples had a reward."
    )
    assert "Saved at step 3; the same command goes on" in str(error.value)
    stopped = runs.result(tmp_path)
    applied = [row["update/applied"] for row in stopped.rows[1:]]
    assert applied == [1, 0, 0]
    assert [row["reward/valid_fraction"] for row in stopped.rows[1:]] == [1, 0.5, 0.5]
    service.fault = lambda phase, sample: ""
    assert runs.train(tmp_path, **{**service.settings, "num_steps": 4})["steps"] == 4
    rows = runs.result(tmp_path).rows
    assert rows[:4] == stopped.rows
    assert rows[4]["update/applied"] == 1


def test_a_few_failed_samples_are_masked_and_another_model_is_refused(runs, service, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    masked = lambda phase, sample: "nan" if (phase, sample) == ("step0", 2) else ""  # noqa: E731
    service.fault = masked
    runs.train(straight, **service.settings)
    expected = runs.result(straight)
    assert expected.rows[1]["reward/valid_fraction"] == 0.75
    assert [row["update/applied"] for row in expected.rows[1:]] == [1, 1, 1]
    assert all(np.isfinite(x).all() for x in expected.arrays)

    service.fault = lambda phase, sample: (
        "another model" if phase == "step2" else masked(phase, sample)
    )
    with pytest.raises(scoring.RewardModelChangedError, match="nothing was applied"):
        runs.train(broken, **service.settings)
    with pytest.raises(ValueError, match=r"config.rewards: the reward model has changed") as error:
        runs.train(broken, **service.settings)
    assert "model-a" in str(error.value)
    assert "model-b" in str(error.value)
    service.fingerprint, service.fault = "model-a", masked
    runs.train(broken, **service.settings)
    runs.assert_same(broken, expected)


def test_an_own_service_that_falls_silent_costs_no_rollout(
    runs, straight, tmp_path, monkeypatch, caplog
):
    kept = []

    class Kept(reward_service.supervisor.KeptServer):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append((self, self.pid))

    monkeypatch.setattr(loop, "open_scorer", runs.open_scorer)
    monkeypatch.setattr(reward_service.supervisor, "KeptServer", Kept)
    submit = reward_service.client_lib.RewardClient.submit

    def stop_and_submit(self, video, prompt, request_id, fps):
        if request_id.startswith("step1/") and kept[0][0].pid == kept[0][1]:
            os.kill(kept[0][1], signal.SIGSTOP)
        return submit(self, video, prompt, request_id, fps)

    monkeypatch.setattr(reward_service.client_lib.RewardClient, "submit", stop_and_submit)
    runs.train(tmp_path, **{"rewards.silence_seconds": 1.0})
    ((server, first),) = kept
    assert server.pid != first
    assert f"(process {first}) has answered none of 5 probes in 1 s: killing it" in caplog.text
    runs.assert_same(tmp_path, straight)


def test_a_run_that_has_begun_waits_longer_for_its_service(runs, tmp_path, monkeypatch):
    budgets = []

    def info(self, budget):
        budgets.append(budget)
        raise reward_service.reward_types.RewardServiceError("UNAVAILABLE", "connection refused")

    monkeypatch.setattr(reward_service.client_lib.RewardClient, "info", info)
    config = runs.config(
        **{"rewards.spawn": False, "rewards.address": "h:1", "rewards.budget_seconds": 900.0}
    )
    with (
        pytest.raises(ValueError, match="no reward service answers"),
        runs.open_scorer(config, tmp_path),
    ):
        pass
    (tmp_path / "checkpoints").mkdir()
    with (
        pytest.raises(reward_service.reward_types.RewardServiceError),
        runs.open_scorer(config, tmp_path),
    ):
        pass
    assert budgets == [reward_service.FIRST_CONTACT_SECONDS, 900.0]
