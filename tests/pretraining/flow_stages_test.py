"""What the transformer learns from: noisy clips, their velocities and captions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.models import hunyuan_video
from sage_grpo_jax.pretraining import flow_stages as pretraining_flow
from sage_grpo_jax.pretraining import settings as pretraining_config

CLIPS, CAPTIONS, BATCH = 6, 4, 4000


@pytest.fixture(scope="module")
def stage():
    return pretraining_config.FlowStageConfig(
        steps=1, batch_size=BATCH, learning_rate=1.0, caption_drop=0.25
    )


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return pretraining_flow.FlowData(
        latents=jnp.asarray(rng.standard_normal((CLIPS, 2, 1, 1, 3)), jnp.float32),
        caption=jnp.asarray([2, 0, 1, 3, 3, 1], jnp.int32),
        text=jnp.asarray(rng.standard_normal((CAPTIONS + 1, 2, 5)), jnp.float32),
        mask=jnp.asarray(rng.random((CAPTIONS + 1, 2)) < 0.7),
        rivals=jnp.tile(jnp.arange(CAPTIONS + 1)[:, None], 2),
    )


def test_noisy_clips_lie_between_a_clip_and_noise(stage, data):
    """x = (1 - σ)·x0 + σ·z with the target z - x0, so that x - σ·target is a clip of the data."""
    batch = pretraining_flow.noisy_batch(jax.random.key(3), data, stage)
    sigma = np.asarray(batch.sigma)[:, None, None, None, None]
    clean = np.asarray(batch.noisy - sigma * batch.target)
    distance = np.abs(clean[:, None] - np.asarray(data.latents)).max((2, 3, 4, 5))
    clip = distance.argmin(1)
    assert distance.min(1).max() < 1e-4
    noise = clean + np.asarray(batch.target)
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert np.bincount(clip, minlength=CLIPS).min() > 0.8 * BATCH / CLIPS
    # Its own caption, or the empty one, which is the last row.
    row, own = np.asarray(batch.row), np.asarray(data.caption)[clip]
    assert set(row[row != own]) == {CAPTIONS}
    assert np.mean(row == CAPTIONS) == pytest.approx(0.25, abs=0.03)


def test_the_loss_is_the_squared_distance_from_the_velocity(stage, data, monkeypatch):
    """Of what the model says of state, 1000·σ and caption."""

    def velocity(params, latents, timestep, condition, config):
        told = (condition.text * condition.text_mask[..., None]).sum((1, 2)) + timestep / 1000
        return params * latents + told[:, None, None, None, None]

    monkeypatch.setattr(hunyuan_video, "velocity", velocity)
    key = jax.random.key(5)
    loss_fn = pretraining_flow.flow_loss_fn(hunyuan_video.HunyuanVideoConfig(), stage)
    loss, parts = loss_fn(jnp.float32(0.5), key, jnp.int32(0), *data)
    batch = jax.tree.map(np.asarray, pretraining_flow.noisy_batch(key, data, stage))
    text, mask = np.asarray(data.text)[batch.row], np.asarray(data.mask)[batch.row]
    told = (text * mask[..., None]).sum((1, 2)) + batch.sigma
    errors = (0.5 * batch.noisy + told[:, None, None, None, None] - batch.target) ** 2
    assert float(loss) == pytest.approx(errors.mean(), rel=1e-4)
    for name, rows in (("low", batch.sigma < 0.5), ("high", batch.sigma >= 0.5)):
        assert float(parts[f"error_{name}_sigma"]) == pytest.approx(errors[rows].mean(), rel=1e-4)
