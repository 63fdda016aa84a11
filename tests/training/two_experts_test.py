"""A model that nobody ever heard of: two experts, by noise level, through the door alone."""

import dataclasses

import jax
import numpy as np
import pytest
import two_experts
from learners import make

from sage_grpo_jax import weights
from sage_grpo_jax.data import media
from sage_grpo_jax.flow import noise, schedules
from sage_grpo_jax.models import frames, lora
from sage_grpo_jax.policy import sampler
from sage_grpo_jax.sampling import outputs, sources
from sage_grpo_jax.sampling import run as sampling_run
from sage_grpo_jax.weights import conversion
from sage_grpo_jax.worlds.moving_shapes import word_embeddings

CONFIG = two_experts.Config()
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_params(seed: int):
    shapes = jax.eval_shape(lambda: two_experts.init_params(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.5 * rng.standard_normal(s.shape).astype(np.float32), shapes)


@pytest.fixture
def make_expert_config(monkeypatch, make_config, tmp_path):
    """make_expert_config(overrides) -> a recipe with two experts beside the tiny VAE."""
    two_experts.register(monkeypatch)
    weights.save(random_params(0), tmp_path / "experts", config=CONFIG)
    given = {
        "model.transformer": str(tmp_path / "experts"),
        "trust_region.kind": "none",
        "rollout.guidance": 2.0,
        "rollout.last_step": "deterministic",
    }
    return lambda overrides=None: make_config({**given, **(overrides or {})})


def expert_velocity(params, latents, timestep: float, text):
    """One expert in float64: the one whose noise level it is."""
    own = params["high" if timestep >= CONFIG.boundary else "low"]
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), own)
    x = latents
    for layer in range(CONFIG.num_layers):
        x = np.tanh(x @ own["blocks"]["mix"]["kernel"][layer] + own["blocks"]["mix"]["bias"][layer])
    shift = text @ own["text"]["kernel"] + own["text"]["bias"]
    return x + shift[:, None, None, None]


def mean_text(text: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean of the tokens of each prompt."""
    mask = mask[..., None].astype(np.float64)
    return (text * mask).sum(1) / np.maximum(mask.sum(1), 1)


def euler(config, initial, text: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Four steps of the evaluation's ODE with guidance 2, in float64."""
    schedule = schedules.make_schedule(4, config.rollout.shift)
    chosen = np.asarray(schedule.timesteps) >= CONFIG.boundary
    assert chosen.any()
    assert not chosen.all()

    params, other = random_params(0), np.broadcast_to(negative, text.shape)
    x = np.asarray(initial, np.float64)
    for t, timestep in enumerate(np.asarray(schedule.timesteps)):
        away = expert_velocity(params, x, timestep, other)
        v = away + 2.0 * (expert_velocity(params, x, timestep, text) - away)
        x = x + (float(schedule.sigmas[t + 1]) - float(schedule.sigmas[t])) * v
    return x


def test_each_step_is_sampled_by_its_expert(make_expert_config, local_scorer, one_device, tmp_path):
    """The evaluation's ODE with guidance, against Euler steps in float64."""
    config = make_expert_config({"eval.num_steps": 4})
    trainer = make(config, local_scorer(), one_device, tmp_path)
    prompts = next(iter(trainer.prompts)).repeat(config.rollout.group_size)
    keys = noise.sample_keys(5, 0, 0, np.arange(16, dtype=np.uint32), np.zeros(16, np.uint32))
    found = np.asarray(trainer.learner.sample(trainer.state.params, prompts, keys))

    initial = noise.initial_noise(keys, trainer.learner.plan.latent_shape)
    negative = trainer.prompts.negative
    texts = mean_text(prompts.text, prompts.mask), mean_text(negative.text, negative.mask)
    np.testing.assert_allclose(found, euler(config, initial, *texts), **CLOSE)


def test_the_frames_of_sample_are_those_of_its_experts(make_expert_config, tmp_path, monkeypatch):
    """From captions to frames, two seeds each; the latents against Euler steps in float64."""
    clips = {}
    monkeypatch.setattr(media, "write_clip", lambda path, clip, _: clips.update({path.name: clip}))
    monkeypatch.setattr(outputs, "write_sheet", lambda *args: None)
    config, captions = make_expert_config({"eval.num_steps": 4}), ["a red disk", "a blue square"]
    (tmp_path / "prompts.txt").write_text("\n".join(captions))
    request = sampling_run.Request(
        sources.Source(), str(tmp_path / "prompts.txt"), tmp_path / "out", seeds=(0, 5)
    )
    assert sampling_run.sample(config, request, jax.devices()[:1]) == 4

    *texts, negative = mean_text(*word_embeddings.encode_padded([*captions, ""], CONFIG.text_dim))
    ids, seeds = ["000001", "000001", "000002", "000002"], [0, 5, 0, 5]
    keys = jax.random.wrap_key_data(sampler.key_data(seeds, ids))
    vae = weights.load_config(config.model.vae)
    initial = noise.initial_noise(keys, frames.latent_shape(vae, 5, 32, 32))
    latents = euler(config, initial, np.repeat(texts, 2, axis=0), negative)
    vae_params = weights.load(config.model.vae, vae)
    want = np.asarray(frames.decode_frames(vae_params, latents.astype(np.float32), vae))
    assert want.std() > 5
    for row, (id_, seed) in enumerate(zip(ids, seeds, strict=True)):
        found = clips[f"{row // 2:03d}_{id_}_seed{seed}.mp4"]
        # A value may lie on the border between two levels.
        assert np.abs(found.astype(int) - want[row]).max() <= 1


@pytest.mark.parametrize(("window_size", "trained"), [(2, ("high",)), (3, ("high", "low"))])
def test_a_step_trains_the_experts_of_its_window(
    make_expert_config, local_scorer, one_device, tmp_path, window_size, trained
):
    window = {"rollout.window": "first_k", "rollout.window_size": window_size}
    trainer = make(make_expert_config(window), local_scorer(), one_device, tmp_path)
    assert np.asarray(trainer.learner.plan.schedule.timesteps)[:3].tolist()[1] >= CONFIG.boundary
    assert np.asarray(trainer.learner.plan.schedule.timesteps)[2] < CONFIG.boundary

    before = jax.tree.map(np.array, trainer.state.params)
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    assert metrics["ratio/max_deviation"] == 0
    for name in two_experts.EXPERTS:
        moved = [
            np.any(np.asarray(a) != b)
            for a, b in zip(
                jax.tree.leaves(trainer.state.params[name]),
                jax.tree.leaves(before[name]),
                strict=True,
            )
        ]
        assert all(moved) if name in trained else not any(moved), name


def test_adapters_of_both_experts(make_expert_config, local_scorer, one_device, tmp_path):
    """Trained, written and read again: the product is in the folder."""
    given = {"lora.rank": 2, "lora.targets": "proj,high/text"}
    config = make_expert_config(given)
    trainer = make(config, local_scorer(), one_device, tmp_path)
    (metrics,) = trainer.steps(1)
    assert metrics["update/applied"] == 1
    adapters = jax.tree.map(np.asarray, trainer.state.params)
    assert set(adapters["high"]) == {"blocks", "text"}
    assert set(adapters["low"]) == {"blocks"}

    weights.save_adapters(adapters, tmp_path / "peft", config.lora.adapters, CONFIG)
    found, same = weights.load_adapters(tmp_path / "peft", CONFIG)
    assert set(same.targets) == {"proj", "high/text"}
    jax.tree.map(np.testing.assert_array_equal, adapters, jax.tree.map(np.asarray, found))

    job = conversion.Job(
        tmp_path / "peft", "peft", tmp_path / "merged", "diffusers", base=tmp_path / "experts"
    )
    conversion.convert(job)
    merged = weights.load(tmp_path / "merged", weights.load_config(tmp_path / "merged"))
    want = lora.merge(random_params(0), adapters, config.lora.adapters.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, want)


def test_targets_that_the_model_has_nothing_for_are_refused():
    with pytest.raises(ValueError, match=r"lora.targets: got \('query', 'key'\)"):
        lora.adapted_paths(lora.LoraConfig(1, 1.0, ("query", "key")), two_experts)


def test_a_layout_that_the_model_does_not_have(make_expert_config, tmp_path):
    make_expert_config()
    with pytest.raises(ValueError, match=r"layout='tencent': must be one of \['diffusers'\] for a"):
        weights.save(random_params(0), tmp_path / "other", "tencent", config=CONFIG)
    assert not (tmp_path / "other").exists()
    narrow = dataclasses.replace(CONFIG, out_channels=3)
    with pytest.raises(ValueError, match="instead of"):
        weights.load(tmp_path / "experts", narrow)
