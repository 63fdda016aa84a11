"""The loop around the steps: what is evaluated when, what a resumed run checks, summary.json."""

from types import SimpleNamespace

import pytest

from sage_grpo_jax.training import evaluation, loop


@pytest.fixture
def make_run(make_config, monkeypatch):
    """make_run(overrides) -> (a run of which only the evaluation works, what it evaluates)."""
    asked = []

    def evaluate(learner, params, prompts, split="eval"):
        asked.append((params, prompts, split))
        return SimpleNamespace(metrics={f"{split}/reward/overall": 1.0})

    monkeypatch.setattr(evaluation, "evaluate", evaluate)

    def make(overrides=None):
        run = object.__new__(loop._Run)
        run.config = make_config({"num_steps": 9, "eval.every": 3, **(overrides or {})})
        run.learner, run.writer = None, None
        run.prompts = SimpleNamespace(evaluation="validation", test="test")
        run.state = SimpleNamespace(params="trained", ema="average")
        return run, asked

    return make


def test_evaluations_are_due_every_so_often_and_at_the_end(make_run):
    def due(run):
        return [step for step in range(1, 10) if run._evaluation_due(step)]

    assert due(make_run()[0]) == [3, 6, 9]
    assert due(make_run({"eval.every": 4})[0]) == [4, 8, 9]
    assert due(make_run({"eval.every": 0})[0]) == [9]


def test_test_prompts_are_looked_at_before_and_after_only(make_run):
    run, asked = make_run()
    for step in (0, 3, 6, 9):
        found = run._evaluate(step)
        wanted = [("trained", "validation", "eval")]
        if step in (0, 9):
            wanted.append(("trained", "test", "test"))
        assert asked == wanted
        assert {name for name in found if name != "time/eval"} == {
            f"{split}/reward/overall" for _, _, split in wanted
        }
        asked.clear()
    run.prompts.test = None
    run._evaluate(9)
    assert asked == [("trained", "validation", "eval")]


def test_the_average_is_evaluated_on_request(make_run):
    run, asked = make_run({"eval.weights": "ema", "ema.decay": 0.9})
    run._evaluate(0)
    assert asked == [("average", "validation", "eval"), ("average", "test", "test")]


@pytest.fixture
def resume(make_config):
    """resume(**record) -> a run that has read this record of a checkpoint."""

    def make(**record):
        run = object.__new__(loop._Run)
        run.config = make_config({"rewards.max_skipped_updates": 2})
        run.fingerprint = "reward model"
        run.prompts = SimpleNamespace(train=None, fingerprint="prompts")
        state = SimpleNamespace(step=4)
        full = {"skipped": 0, "fingerprint": "reward model", "prompts": "prompts", **record}
        run.checkpoints = SimpleNamespace(
            restore=lambda abstract, iterator: (state, full), wait=lambda: None
        )
        run._save = lambda: None
        run._restore(None)
        return run

    return make


def test_a_run_resumes_with_its_own_rewards_and_prompts_only(resume):
    run = resume(unwritten={"reward/overall": 1.0})
    assert (run.state.step, run.unwritten) == (4, {"reward/overall": 1.0})
    assert resume().unwritten is None
    with pytest.raises(ValueError, match=r"config\.rewards: the reward model has changed"):
        resume(fingerprint="another model")
    with pytest.raises(ValueError, match=r"config\.data\.train_prompts: .* other prompts"):
        resume(prompts="others")


def test_skips_in_a_row_end_the_run_across_resumptions(resume):
    skipped = {"update/applied": 0.0, "reward/valid_fraction": 0.5}
    run = resume()
    for values in (skipped, {"update/applied": 1.0}, skipped):
        run._count_skips(values)
    with pytest.raises(loop.TooManySkipsError, match="2 updates in a row"):
        run._count_skips(skipped)
    with pytest.raises(loop.TooManySkipsError, match="2 updates in a row"):
        resume(skipped=1)._count_skips(skipped)


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
