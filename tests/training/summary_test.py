"""summary.json: what the first and the last evaluation found, where the time went."""

import pytest

from sage_grpo_jax.training import loop


def test_first_and_last_evaluation_of_each_split(make_config):
    rows = [
        {"step": 0, "eval/a": 1.0, "test/a": 5.0, "time/eval": 2.0},
        {"step": 1, "reward/overall": 0.5, "time/step": 3.0},
        {"step": 2, "eval/a": 2.0, "reward/overall": 0.6, "time/step": 4.0, "time/eval": 1.0},
        {"step": 3, "eval/a": 3.0, "eval/b": 9.0, "test/a": 6.0, "time/step": 5.0},
    ]
    config = make_config({"name": "some run", "seed": 7})
    summary = loop.summarise(rows, config)
    assert summary["eval"] == {"first": {"eval/a": 1.0}, "last": {"eval/a": 3.0, "eval/b": 9.0}}
    assert summary["test"] == {"first": {"test/a": 5.0}, "last": {"test/a": 6.0}}
    assert summary["time"] == {"time/eval": 3.0, "time/step": 12.0}
    assert (summary["steps"], summary["seed"], summary["name"]) == (3, 7, "some run")


def test_a_split_without_evaluation_is_empty(make_config):
    summary = loop.summarise([{"step": 4, "eval/a": 1.0}], make_config())
    assert summary["test"] == {"first": {}, "last": {}}
    assert summary["eval"]["first"] == summary["eval"]["last"] == {"eval/a": 1.0}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"loss/policy": float("nan"), "loss/total": float("nan")}, "loss/policy was not finite"),
        ({"loss/policy": 1.0, "kl/anchor": float("inf")}, "kl/anchor was not finite"),
        ({"loss/total": 1.0, "grad/norm": float("nan")}, "grad/norm was not finite"),
        ({"loss/total": 1.0, "grad/norm": 1.0}, "the new parameters were not finite"),
        ({"reward/valid_fraction": 0.25}, "only 25 % of the samples had a reward"),
    ],
)
def test_the_cause_of_a_skipped_update_is_named(values, reason):
    assert loop.skip_reason(values) == reason
