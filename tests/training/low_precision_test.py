"""bfloat16 trains on the gradient that it means to, whatever the rollout was rounded to."""

import pytest
import update_process

# The shipped policy without remat, with the guidance and the schedule of the full recipe: here
# rollout and update are compiled to programs that round apart.
OVERRIDES = {
    "trust_region.kind": "none",
    "model.compute_dtype": "bfloat16",
    "model.remat": False,
    "model.unroll": False,
    "rollout.guidance": 6.0,
    "rollout.num_steps": 20,
    "rollout.shift": 5.0,
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 4,
    "rollout.decode_batch": 8,
    "loss.micro_batch": 8,
    # What comes after the gradient stays out of it: later updates see the same parameters.
    "optimizer.learning_rate": 1e-30,
}


@pytest.mark.parametrize(
    ("updates", "objectives"),
    [
        (1, ("ppo",)),
        # Also that the gradient is that of the loss without clipping, which compiles as long again.
        pytest.param(1, ("ppo", "reinforce"), marks=pytest.mark.slow),
        pytest.param(3, ("ppo", "reinforce"), marks=pytest.mark.slow),
    ],
)
def test_the_ratio_starts_at_one_and_nothing_is_clipped(updates, objectives):
    overrides = {**OVERRIDES, "loss.updates_per_rollout": updates}
    found = update_process.measure(overrides, objectives)
    # Without a mismatch there would be nothing to see here: 200 times the clip range.
    assert found["ratio/rollout_mismatch"] > 5e-3
    steps = [found[f"ratio/rollout_mismatch/step_{t:02d}"] for t in range(19)]
    assert max(steps) == found["ratio/rollout_mismatch"]
    assert max(steps[:5]) < 0.1 * max(steps)  # the last steps have the least noise
    assert "ratio/rollout_mismatch/step_19" not in found  # deterministic

    assert found["update/applied"] == 1
    if updates == 1:
        assert found["ratio/max_deviation"] == 0
    else:
        assert found["ratio/max_deviation"] <= 1e-6
    assert found["ratio/clip_fraction"] == 0
    assert found["cosine"] > 0.999
