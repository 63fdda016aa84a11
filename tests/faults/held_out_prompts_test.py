"""Training reads the training prompts, evaluation the evaluation prompts, and nothing else."""

import pytest
from entry_modules import import_entry

from sage_grpo_jax.training import loop, reward_service
from sage_grpo_jax.worlds.moving_shapes import spec as moving_shapes_spec


@pytest.fixture
def prompts(tmp_path):
    """(overrides, training prompts, evaluation prompts): two files without a common line."""
    captions = sorted(moving_shapes_spec.train_captions())
    train, held_out = set(captions[:6]), set(captions[6:10])
    overrides = {"eval.num_prompts": 4, "eval.every": 1, "data.test_prompts": ""}
    for name, lines in (("train", train), ("eval", held_out)):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(f"{line}\n" for line in sorted(lines)))
        overrides[f"data.{name}_prompts"] = str(path)
    return overrides, train, held_out


@pytest.fixture
def scored(runs):
    """request id -> prompt of every video that was scored."""
    found = {}

    class Recorder(type(runs.scorer)):
        def submit(self, video, prompt, request_id, fps):
            found[request_id] = prompt
            return super().submit(video, prompt, request_id, fps)

    runs.scorer = Recorder()
    return found


def asked(scored, what: str) -> set[str]:
    return {prompt for request_id, prompt in scored.items() if request_id.startswith(what)}


def test_a_run_evaluates_held_out_prompts_only(runs, scored, prompts, tmp_path):
    overrides, train, held_out = prompts
    runs.train(tmp_path / "run", num_steps=3, **overrides)
    assert asked(scored, "eval") == held_out  # all of them
    assert asked(scored, "step") <= train
    assert len(asked(scored, "step")) > 1


def test_the_command_evaluates_held_out_prompts_only(runs, scored, prompts, tmp_path, monkeypatch):
    overrides, _, held_out = prompts
    runs.train(tmp_path / "run", num_steps=1, **overrides)
    scored.clear()
    monkeypatch.setattr(reward_service, "open_scorer", loop.open_scorer)  # the local one
    evaluate = import_entry("evaluate")
    evaluate.evaluate(runs.config(**overrides), str(tmp_path / "run"), tmp_path / "out")
    assert asked(scored, "") == held_out
