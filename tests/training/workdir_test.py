"""Whose rewards a workdir holds: the same ones resume, others are refused in one line."""

import dataclasses
import json

import pytest

from sage_grpo_jax.common.frozen_dict import FrozenDict
from sage_grpo_jax.training import workdir


@pytest.fixture
def begun(make_config, tmp_path):
    """begun(weights) -> (the config with these rewards, a folder in which its run has begun)."""

    def make(weights):
        config = make_config()
        rewards = dataclasses.replace(config.rewards, weights=FrozenDict(weights))
        config = dataclasses.replace(config, rewards=rewards)
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        return config, tmp_path

    return make


def test_a_run_with_rewards_of_its_own_resumes(begun):
    """What the default recipe lists and this one does not is no field that it lacks."""
    config, folder = begun({"zoom": 1.0, "aesthetic": 0.0})
    workdir.claim(config, folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["rewards"]["weights"] == {"zoom": 1.0, "aesthetic": 0.0}


def test_a_run_of_before_resumes(begun):
    """Its config.json has the weights of VQ, MQ and TA, and no `advantage.combine`."""
    config, folder = begun({"VQ": 1.0, "MQ": 1.0, "TA": 1.0})
    values = json.loads((folder / "config.json").read_text())
    del values["advantage"]["combine"]
    (folder / "config.json").write_text(json.dumps(values))
    workdir.claim(config, folder)
    changed = dataclasses.replace(config.advantage, combine="per_reward")
    config = dataclasses.replace(config, advantage=changed)
    with pytest.raises(ValueError, match=r"advantage.combine \('sum' there, 'per_reward' here\)"):
        workdir.claim(config, folder)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"zoom": 2.0, "aesthetic": 0.0}, r"rewards.weights.zoom \(1.0 there, 2.0 here\)"),
        ({"zoom": 1.0}, r"rewards.weights.aesthetic \(0.0 there, None here\)"),
        (
            {"zoom": 1.0, "aesthetic": 0.0, "VQ": 1.0},
            r"rewards.weights.VQ \(None there, 1.0 here\)",
        ),
    ],
)
def test_other_rewards_are_another_run(begun, weights, said):
    config, folder = begun({"zoom": 1.0, "aesthetic": 0.0})
    rewards = dataclasses.replace(config.rewards, weights=FrozenDict(weights))
    with pytest.raises(ValueError, match=said) as error:
        workdir.claim(dataclasses.replace(config, rewards=rewards), folder)
    assert "\n" not in str(error.value)


def test_a_run_is_finished_after_its_last_step(make_config, tmp_path):
    config = make_config({"num_steps": 5})
    assert workdir.finished(config, tmp_path) is None
    for steps, wanted in ((4, None), (5, {"steps": 5}), (6, {"steps": 6})):
        (tmp_path / "summary.json").write_text(json.dumps({"steps": steps}))
        assert workdir.finished(config, tmp_path) == wanted
