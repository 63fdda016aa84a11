"""The service is asked for the rewards of the recipe, and refused where it lacks one."""

import dataclasses

import pytest
from scripted_service import Script, scripted

from sage_grpo_jax.common.frozen_dict import FrozenDict
from sage_grpo_jax.training import loop, reward_service
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training.blueprint import Blueprint


@pytest.fixture
def make_run(make_config):
    """make_run(address, weights) -> the tiny recipe with these rewards of a running service."""

    def make(address, weights):
        service = {"rewards.spawn": False, "rewards.address": address}
        config = make_config({**service, "mesh.fsdp": -1})  # all the devices of these tests
        rewards = dataclasses.replace(config.rewards, weights=FrozenDict(weights))
        return dataclasses.replace(config, rewards=rewards)

    return make


def test_a_reward_that_the_service_lacks_is_refused_before_anything_is_loaded(
    make_run, tmp_path, monkeypatch
):
    def never(*args):
        raise AssertionError("weights were loaded")

    for name in ("load_vae", "load_base", "fresh_state"):
        monkeypatch.setattr(Blueprint, name, never)
    monkeypatch.setattr(programs_lib, "build", never)
    with scripted(Script()) as address:
        config = make_run(address, {"VQ": 1.0, "zoom": 1.0, "aesthetic": 0.0})
        with pytest.raises(ValueError, match=r"^config\.rewards\.weights: ") as error:
            loop.train(config, tmp_path)
    assert str(error.value) == (
        f"config.rewards.weights: got VQ, zoom, aesthetic; {address} does not score aesthetic, "
        "zoom; allowed: VQ, MQ, TA"
    )


def test_rewards_that_nobody_named_are_ignored(make_run, tmp_path):
    with (
        scripted(Script()) as address,
        reward_service.open_scorer(make_run(address, {"TA": 1.0}), tmp_path) as client,
    ):
        assert client.fingerprint == "model-a"


def test_monitored_rewards_are_optional_ones(make_run, tmp_path, monkeypatch):
    asked = {}

    class Client(reward_service.client_lib.RewardClient):
        def __init__(self, *args, **options):
            asked.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(reward_service.client_lib, "RewardClient", Client)
    with scripted(Script()) as address:
        config = make_run(address, {"VQ": 0.0, "MQ": -1.0, "TA": 2.0})
        with reward_service.open_scorer(config, tmp_path):
            pass
    assert list(asked["reward_names"]) == ["VQ", "MQ", "TA"]
    assert list(asked["optional_names"]) == ["VQ"]


def test_a_check_that_nobody_handed_in_is_no_check(make_config, tmp_path):
    """`training` knows no shadow: whoever asks for one brings it."""
    with pytest.raises(ValueError, match=r"config\.debug\.shadow: got True without"):
        loop.train(make_config({"debug.shadow": True}), tmp_path)
    assert not list(tmp_path.iterdir())
