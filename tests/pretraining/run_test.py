"""Pretraining in miniature: each stage learns, an interrupted run ends like an unbroken one."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from sage_grpo_jax import weights
from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.pretraining import flow_stages as pretraining_flow
from sage_grpo_jax.pretraining import loop as pretraining_loop
from sage_grpo_jax.pretraining import run as pretraining
from sage_grpo_jax.pretraining import settings as pretraining_config
from sage_grpo_jax.pretraining import vae_stages as pretraining_vae
from sage_grpo_jax.pretraining.settings import FlowStageConfig, StageConfig
from sage_grpo_jax.training import optimizers
from sage_grpo_jax.worlds.moving_shapes import spec, word_embeddings
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes

STEPS = 40
VAE_STAGE = {
    "steps": STEPS,
    "batch_size": 4,
    "noise_warmup_steps": 10 * STEPS,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "log_every": 1,
    "checkpoint_every": 10,
}
FLOW_STAGE = {
    "steps": STEPS,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "log_every": 1,
    "checkpoint_every": 10,
}
DISTILL = {"guidance": 3.0, "contrast": 0.5, "caption_drop": 0.4, "first_frame_weight": 4.0}
TINY_VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}
TINY_TRANSFORMER = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 8,
    "text_embed_2_dim": None,
    "image_embed_dim": None,
    "rope_axes_dim": (2, 2, 4),
}


def tiny_config() -> pretraining_config.PretrainConfig:
    return pretraining_config.from_mapping(
        {
            "seed": 0,
            "vae_model": TINY_VAE,
            "transformer": TINY_TRANSFORMER,
            # Equal stages are one program, which is compiled once.
            "vae": VAE_STAGE,
            "polish": VAE_STAGE,
            "decoder": VAE_STAGE,
            "latents": {"num_clips": 8, "batch_size": 4},
            "flow": FLOW_STAGE,
            "distill": {**FLOW_STAGE, **DISTILL},
            "sharpen": {**VAE_STAGE, "max_sigma": 0.4},
            "report": {"sampling_steps": [2], "num_samples": 2, "sheet_rows": 2},
        }
    )


def losses(workdir: pathlib.Path, stage: str) -> list[float]:
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    chosen = [entry for entry in entries if entry["stage"] == stage]
    assert [entry["step"] for entry in chosen] == list(range(1, len(chosen) + 1))
    return [entry["loss"] for entry in chosen]


class LinearVae:
    """One matrix each way for every block of 4x8x8 pixels: the real one takes long to compile."""

    @staticmethod
    def init_params(config, key):
        keys = jax.random.split(key)
        encoder = {"kernel": 0.03 * jax.random.normal(keys[0], (768, 8))}
        decoder = {"kernel": 0.3 * jax.random.normal(keys[1], (4, 768)), "bias": jnp.zeros(768)}
        return {"encoder": encoder, "decoder": decoder}

    @staticmethod
    def encode(params, videos, config):
        padded = jnp.concatenate([jnp.repeat(videos[:, :1], 3, axis=1), videos], axis=1)
        blocks = padded.reshape(len(videos), -1, 4, 4, 8, 4, 8, 3)
        blocks = blocks.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(videos), -1, 4, 4, 768)
        return jnp.split(blocks @ params["encoder"]["kernel"], 2, axis=-1)

    @staticmethod
    def decode(params, latents, config):
        blocks = latents @ params["decoder"]["kernel"] + params["decoder"]["bias"]
        blocks = blocks.reshape(len(latents), -1, 4, 4, 4, 8, 8, 3)
        videos = blocks.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(latents), -1, 32, 32, 3)
        return videos[:, 3:]


@pytest.fixture(autouse=True)
def linear_vae(request, monkeypatch):
    if "slow" not in request.keywords:
        for name in ("init_params", "encode", "decode"):
            monkeypatch.setattr(vae, name, getattr(LinearVae, name))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("init_params", "encode", "decode"):
            patch.setattr(vae, name, getattr(LinearVae, name))
        pretraining.run(tiny_config(), workdir, [s for s in pretraining.STAGES if s != "export"])
    return workdir


def test_losses_fall(finished):
    flow, autoencoder = losses(finished, "flow"), losses(finished, "vae")
    assert len(flow) == len(autoencoder) == STEPS
    assert np.mean(flow[-5:]) < 0.9 * np.mean(flow[:5])
    assert np.mean(autoencoder[-5:]) < 0.8 * np.mean(autoencoder[:5])
    # The later stages go on from where the earlier one ended.
    assert np.mean(losses(finished, "polish")[-5:]) < np.mean(autoencoder[-5:])
    assert np.mean(losses(finished, "decoder")[-5:]) < np.mean(autoencoder[-5:])
    distilled, sharpened = losses(finished, "distill"), losses(finished, "sharpen")
    assert np.mean(distilled[-5:]) < 0.9 * np.mean(distilled[:5])
    assert np.mean(sharpened[-5:]) < np.mean(sharpened[:5])


def test_the_decoder_stages_leave_the_encoder_alone(finished):
    polished = pretraining_loop.load_average(finished / "polish")[1]
    decoders = [polished["decoder"]]
    for stages in (("decoder",), ("decoder", "sharpen")):
        steps, params = pretraining.load_vae(finished, stages)
        assert steps == {"polish_step": STEPS, **{f"{stage}_step": STEPS for stage in stages}}
        jax.tree.map(np.testing.assert_array_equal, params["encoder"], polished["encoder"])
        decoders.append(params["decoder"])
    for before, after in itertools.pairwise(jax.tree.leaves(tree) for tree in decoders):
        assert any((a != b).any() for a, b in zip(before, after, strict=True))


def _flow_batch(finished):
    """The inputs of a distillation loss, the batch that it draws from `key`, and the teacher."""
    config = tiny_config()
    teacher = pretraining_loop.load_average(finished / "flow")[1]
    cache = pretraining.encode_clips(config, jax.random.key(0), finished)
    data = pretraining_flow.flow_data(cache, config.transformer.text_embed_dim)
    return config, teacher, data


def test_distillation_aims_at_the_guided_velocity(finished):
    """At the teacher itself the loss is |(guidance - 1)(c - u) + contrast (c - r)|².

    r says one of the two other shapes, which one is drawn for each clip; dropped captions give 0.
    The first of the five latent frames weighs four times as much as each of the others.
    """
    first_counts_four = np.array([4, 1, 1, 1, 1]) / 8
    config, teacher, data = _flow_batch(finished)
    key = jax.random.key(6)
    batch = pretraining_flow.noisy_batch(key, data, config.distill)
    texts = [*moving_shapes.train_captions(), ""]

    compiled = jax.jit(hunyuan_video.velocity, static_argnums=4)

    def velocity(rows):
        condition = hunyuan_video.Condition(text=data.text[rows], text_mask=data.mask[rows])
        timestep = 1000.0 * batch.sigma
        found = compiled(teacher, batch.noisy, timestep, condition, config.transformer)
        return np.asarray(found, np.float64)

    def with_shape(text, k):
        for shape in spec.SHAPES:
            others = [other for other in spec.SHAPES if other != shape]
            if f" {shape} " in text:
                other, spare = (text.replace(shape, others[i]) for i in (k, 1 - k))
                return other if other in texts else spare
        return text

    rows = np.asarray(batch.row)
    assert (rows == len(texts) - 1).any()
    assert (rows != len(texts) - 1).any()
    captioned, plain = velocity(rows), velocity(np.full(len(rows), len(texts) - 1))
    errors = []
    for k in range(2):
        rival = velocity(np.array([texts.index(with_shape(texts[row], k)) for row in rows]))
        target = plain + 3.0 * (captioned - plain) + 0.5 * (captioned - rival)
        errors.append(np.mean((captioned - target) ** 2, axis=(2, 3, 4)) @ first_counts_four)
    losses_of_draws = [
        np.mean([errors[k][i] for i, k in enumerate(draw)])
        for draw in itertools.product(range(2), repeat=len(rows))
    ]

    loss_fn = jax.jit(pretraining_flow.distill_loss_fn(config.transformer, config.distill))
    found, _ = loss_fn(teacher, key, jnp.zeros((), jnp.int32), teacher, *data)
    nearest = losses_of_draws[np.argmin(np.abs(np.array(losses_of_draws) - found))]
    np.testing.assert_allclose(found, nearest, rtol=1e-4)
    # The draws differ by more than that, and by far from what no contrast would give.
    without_contrast = np.mean((2.0 * (captioned - plain)) ** 2, axis=(2, 3, 4))
    assert abs(min(losses_of_draws) / np.mean(without_contrast @ first_counts_four) - 1) > 0.01
    # Training came nearer to what guidance makes of the teacher.
    steps, student = pretraining.load_transformer(finished)
    assert steps == {"flow_step": STEPS, "distill_step": STEPS}
    assert loss_fn(student, key, jnp.zeros((), jnp.int32), teacher, *data)[0] < found


def test_rivals_say_another_shape_and_are_training_captions():
    texts = [*moving_shapes.train_captions(), ""]
    rivals = pretraining_flow.rival_rows(texts)
    assert rivals[-1].tolist() == [len(texts) - 1] * 2
    counts = []
    for text, pair in zip(texts[:-1], rivals[:-1], strict=True):
        words = text.split()
        changed = []
        for other in (texts[row].split() for row in pair):
            differing = [(a, b) for a, b in zip(words, other, strict=True) if a != b]
            assert len(differing) == 1
            assert set(differing[0]) < set(spec.SHAPES)
            changed.append(differing[0][1])
        counts.append(len(set(changed)))
    assert set(counts) == {1, 2}


def test_sharpening_decodes_what_the_transformer_denoises(finished, monkeypatch):
    """A transformer that knows the noise gives the clean latents back: plain reconstruction."""
    config, _, _ = _flow_batch(finished)
    params = pretraining.load_vae(finished, ("decoder",))[1]
    std = 0.7
    stage = dataclasses.replace(
        config.sharpen, latent_noise=0.0, contrast_weight=2.0, denoising_steps=3
    )
    config = dataclasses.replace(config, sharpen=stage)
    key = jax.random.key(3)
    seen = {}

    def oracle(transformer, noisy, timestep, condition, model):
        keys = jax.random.split(key, 3)
        # Every other clip is denoised.
        noise = jax.random.normal(keys[2], (2 * len(noisy), *noisy.shape[1:]))[::2]
        level = timestep[:, None, None, None, None] / 1000.0
        seen.setdefault("timesteps", []).append(np.asarray(timestep))
        seen["text"] = condition.text
        return noise - (noisy - level * noise) / (1.0 - level)

    monkeypatch.setattr(hunyuan_video, "velocity", oracle)
    frozen = {"encoder": params["encoder"]}
    loss_fn = pretraining_vae.sharpen_loss_fn(config, frozen, None, std)
    decoder = {"decoder": params["decoder"]}
    loss, _ = loss_fn(decoder, key, jnp.zeros((), jnp.int32))
    clips = moving_shapes.sample_parameters(jax.random.split(key, 3)[0], stage.batch_size, "all")
    videos = 2 * moving_shapes.render(clips) - 1
    mean, _ = vae.encode(params, videos, config.vae_model)
    terms = pretraining_vae.reconstruction_terms(
        vae.decode(params, mean, config.vae_model), videos, 2.0
    )
    expected = stage.l1_weight * terms["l1"] + stage.edge_weight * terms["edge"]
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    first, *others = seen["timesteps"]
    assert first.shape == (stage.batch_size / 2,)
    assert 0 < first.max() <= 400.0
    np.testing.assert_allclose(others, [first * 2 / 3, first / 3], rtol=1e-6)
    texts = moving_shapes.captions(clips)[::2]
    encoded, _ = word_embeddings.encode_padded(texts, config.transformer.text_embed_dim)
    length = min(encoded.shape[1], seen["text"].shape[1])
    np.testing.assert_array_equal(seen["text"][:, :length], encoded[:, :length])


@pytest.mark.parametrize("stage", ["vae", "flow"])
def test_an_interrupted_run_ends_with_the_same_bits(finished, tmp_path, monkeypatch, stage):
    class Killed(Exception):
        pass

    def log_and_die(self, step, metrics):
        log(self, step, metrics)
        if step == 25:
            raise Killed

    log = pretraining_loop._Progress.log
    shutil.copytree(finished / "latents", tmp_path / "latents")
    monkeypatch.setattr(pretraining_loop._Progress, "log", log_and_die)
    with pytest.raises(Killed):
        pretraining.run(tiny_config(), tmp_path, [stage])
    monkeypatch.setattr(pretraining_loop._Progress, "log", log)
    assert len(losses(tmp_path, stage)) == 25
    pretraining.run(tiny_config(), tmp_path, [stage])
    assert losses(tmp_path, stage) == losses(finished, stage)
    step, average = pretraining_loop.load_average(tmp_path / stage)
    assert step == STEPS
    expected = pretraining_loop.load_average(finished / stage)[1]
    jax.tree.map(np.testing.assert_array_equal, average, expected)


@pytest.mark.slow
def test_from_start_to_export_with_the_real_autoencoder(tmp_path):
    pretraining.run(tiny_config(), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    trained = ("polish", "decoder", "sharpen", "flow", "distill")
    assert [report[f"{name}_step"] for name in trained] == [STEPS] * 5
    assert report["manifold_distance/real"] < report["manifold_distance/samples_2_steps"]
    vae_file = json.loads((tmp_path / "weights" / "vae" / "config.json").read_text())
    summary = json.loads((tmp_path / "latents" / "summary.json").read_text())
    np.testing.assert_allclose(vae_file["scaling_factor"], 1 / summary["std"])
    loaded = weights.load(tmp_path / "weights" / "transformer", tiny_config().transformer)
    expected = pretraining_loop.load_average(tmp_path / "distill")[1]
    # Shipped in float16: 11 bits.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-11, atol=1e-7), loaded, expected
    )
    assert (tmp_path / "samples_2_steps.png").exists()


def test_cached_latents_show_training_captions_only(finished):
    cache = pretraining.encode_clips(tiny_config(), jax.random.key(0), finished)
    assert cache.latents.shape == (8, 5, 4, 4, 4)
    texts = {moving_shapes.train_captions()[i] for i in cache.caption}
    assert not texts & set(moving_shapes.held_out_captions())
    np.testing.assert_allclose(cache.std, cache.latents.std(), rtol=1e-5)


def test_later_stages_need_earlier_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage latents first"):
        pretraining.run(tiny_config(), tmp_path, ["flow"])
    with pytest.raises(ValueError, match=r"unknown \['eat'\]; allowed: vae, polish"):
        pretraining.run(tiny_config(), tmp_path, ["eat"])


def test_short_clips_are_cuts_of_whole_clips():
    key = jax.random.key(1)
    whole = np.asarray(pretraining_vae.random_clips(key, 2, 17))
    short = np.asarray(pretraining_vae.random_clips(key, 2, 5))
    starts = [i for i in range(13) if (whole[:, i : i + 5] == short).all()]
    assert starts
    assert abs(whole.min() - (2 * 38 / 255 - 1)) < 0.2


def test_sigma_is_the_shifted_logistic_of_a_normal():
    stage = FlowStageConfig(
        steps=1, batch_size=1, learning_rate=1.0, shift=3.0, sigma_mean=0.2, sigma_std=1.5
    )
    sigma = np.sort(pretraining_flow.sample_sigma(jax.random.key(0), 20001, stage))
    plain = sigma / (3.0 - 2.0 * sigma)  # undoes s u / (1 + (s - 1) u) for s = 3
    normal = special.logit(plain.astype(np.float64))
    np.testing.assert_allclose(np.median(normal), 0.2, atol=0.05)
    np.testing.assert_allclose(np.std(normal), 1.5, rtol=0.03)


def test_reconstruction_terms():
    rng = np.random.default_rng(0)
    decoded, videos = rng.standard_normal((2, 2, 3, 4, 5, 3)).astype(np.float32)
    terms = pretraining_vae.reconstruction_terms(jnp.asarray(decoded), jnp.asarray(videos), 2.5)
    error = decoded.astype(np.float64) - videos
    contrast = np.abs(videos - videos.mean((2, 3), keepdims=True)).mean(-1, keepdims=True)
    weight = (1 + 2.5 * contrast) / (1 + 2.5 * contrast).mean()
    across = np.abs(error[..., 1:, :] - error[..., :-1, :]).mean()
    down = np.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
    expected = {
        "l1": (weight * np.abs(error)).mean(),
        "l2": (weight * error**2).mean(),
        "edge": (across + down) / 2,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5)


def test_average_of_weights_and_schedule():
    stage = StageConfig(
        steps=3, batch_size=1, learning_rate=0.1, warmup_steps=1, ema_decay=0.9, gradient_clip=9.0
    )

    def loss_fn(params, key, step):
        return jnp.sum(params["w"]), {}

    state = pretraining_loop.init_state({"w": jnp.ones(2)}, pretraining_loop.make_optimizer(stage))
    update = pretraining_loop.make_update(loss_fn, stage)
    average = 1.0
    for step in range(1, 4):
        state, _ = update(state, jax.random.key(0))
        decay = min(0.9, step / (step + 9))
        average = decay * average + (1 - decay) * float(state.params["w"][0])
        np.testing.assert_allclose(state.average["w"], average, rtol=1e-5)
    # Adam on a constant gradient moves by the learning rate: 0, 0.1, 0.05 (half of a cosine).
    np.testing.assert_allclose(state.params["w"], 1 - 0.15, rtol=1e-4)


def test_muon_sees_a_matrix_for_each_kernel_and_layer():
    params = {
        "conv_in": {"kernel": jnp.zeros((3, 3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "blocks": {"mlp": {"kernel": jnp.zeros((3, 16, 8)), "bias": jnp.zeros((3, 8))}},
        "type_embed": jnp.zeros((3, 8)),
    }
    axes = optimizers.muon_dimensions(params, kernels_only=True)
    assert axes["conv_in"] == {"kernel": ((0, 1, 2, 3), (4,)), "bias": None}
    assert axes["blocks"]["mlp"] == {"kernel": ((1,), (2,)), "bias": None}
    assert axes["type_embed"] is None
    assert optimizers.muon_dimensions(params)["type_embed"] == ((0,), (1,))


def test_muon_updates_are_orthogonal_and_of_the_size_of_adams():
    stage = StageConfig(
        steps=10, batch_size=1, learning_rate=0.1, optimizer="muon", muon_scale=3.0, warmup_steps=0
    )
    optimizer = pretraining_loop.make_optimizer(stage)
    params = {"blocks": {"kernel": jnp.ones((2, 6, 4)), "bias": jnp.ones((2, 4))}}
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.ndim), p.shape), params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    # Adam's first step with Nesterov's momentum: (b1 (1 - b1) / (1 - b1²) + 1) of the rate.
    first = 0.1 * (0.9 * 0.1 / (1 - 0.9**2) + 1)
    np.testing.assert_allclose(np.abs(updates["blocks"]["bias"]), first, rtol=1e-3)
    # The root mean square of Muon's is 0.2 * muon_scale of the rate.
    kernel = np.asarray(updates["blocks"]["kernel"])
    np.testing.assert_allclose(np.sqrt((kernel**2).mean()), 0.1 * 3 * 0.2, rtol=0.2)
    for layer in kernel:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2  # five Newton-Schulz steps: roughly orthogonal


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    stage = StageConfig(steps=4, batch_size=1, learning_rate=0.1, log_every=1, checkpoint_every=1)

    def loss_fn(params, key, step):
        return jnp.sum(jnp.log(params["w"])), {}

    with pytest.raises(FloatingPointError, match=r"toy step 1: .* is -?inf"):
        pretraining_loop.run_stage(
            "toy",
            stage,
            lambda: {"w": jnp.zeros(1)},
            [pretraining_loop.Phase(4, loss_fn)],
            jax.random.key(0),
            (),
            tmp_path,
        )
