"""Pretraining on the moving-shapes world: autoencoder, latents, flow matching, export.

Six stages, each of which continues where it was interrupted:

  vae      reconstruction of random clips (every combination of parameters) plus a small KL term
  polish   the same from its averaged weights, on whole clips only
  decoder  the decoder alone, for the encoder as it then is
  latents  encodes clips of the training combinations once; their spread fixes `scaling_factor`
  flow     rectified flow matching of the transformer on those latents
  export   writes the averaged weights and samples held-out captions

"decoder" does not touch the latents, so that it and "flow" may run at the same time.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax import weights
from sage_grpo_jax.common import files, folders
from sage_grpo_jax.data import moving_shapes, word_embeddings
from sage_grpo_jax.models import hunyuan_video, vae
from sage_grpo_jax.training import pretraining_report
from sage_grpo_jax.training.pretraining_config import (
    FlowStageConfig,
    LatentsStageConfig,
    PretrainConfig,
    VaeStageConfig,
)
from sage_grpo_jax.training.pretraining_loop import (
    LossFn,
    Params,
    Phase,
    load_average,
    run_stage,
    say,
)

STAGES = ("vae", "polish", "decoder", "latents", "flow", "export")
# What a pretraining writes into its folder.
NAMES = (
    "config.json",
    "metrics.jsonl",
    "report.json",
    *(f"{stage}/*" for stage in STAGES if stage != "export"),
    "weights/*",
    *("real.png", "reconstructions.png", "samples_*_steps.png"),
)


class Streams(NamedTuple):
    """One PRNG key for every use of randomness in a run."""

    vae_init: jax.Array
    vae: jax.Array
    latents: jax.Array
    flow_init: jax.Array
    flow: jax.Array
    report: jax.Array
    polish: jax.Array
    decoder: jax.Array


class LatentCache(NamedTuple):
    """Encoded training clips, not yet scaled, and the captions that they show."""

    latents: np.ndarray  # f32[N, T, H, W, C]
    caption: np.ndarray  # int32[N], an index into moving_shapes.train_captions()
    mean: float
    std: float


class FlowData(NamedTuple):
    """What a flow-matching update draws from; the last row of text is the empty prompt."""

    latents: jax.Array  # f32[N, T, H, W, C], scaled to unit spread
    caption: jax.Array  # int32[N]
    text: jax.Array  # f32[K + 1, L, D]
    mask: jax.Array  # bool[K + 1, L]


def run(config: PretrainConfig, workdir: pathlib.Path, stages: Sequence[str] = STAGES) -> None:
    """Runs the given stages in order; finished ones cost nothing.

    Args:
      config: validated settings.
      workdir: created if needed; holds checkpoints, latents, metrics.jsonl, weights and samples.
      stages: which to run; later stages need the results of earlier ones in `workdir`. With
        "export" alone, a run that is still training can be exported as it stands.

    Raises:
      ValueError: for an unknown stage.
      FileNotFoundError: when the result of an earlier stage is missing.
    """
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise ValueError(f"stages: unknown {unknown}; allowed: {', '.join(STAGES)}")
    workdir.mkdir(parents=True, exist_ok=True)
    streams = Streams(*jax.random.split(jax.random.key(config.seed), len(Streams._fields)))
    if "vae" in stages:
        train_vae(config, streams, workdir)
    if "polish" in stages:
        polish_vae(config, streams, workdir)
    if "decoder" in stages:
        train_decoder(config, streams, workdir)
    if "latents" in stages:
        encode_clips(config, streams.latents, workdir)
    if "flow" in stages:
        train_flow(config, streams, workdir)
    if "export" in stages:
        export(config, streams.report, workdir)


# --- vae -----------------------------------------------------------------------------------------


def train_vae(config: PretrainConfig, streams: Streams, workdir: pathlib.Path) -> Params:
    """Trains the autoencoder on clips that are drawn and rendered inside each update."""

    def init_params() -> Params:
        return vae.init_params(config.vae_model, streams.vae_init)

    phases = _vae_phases(config.vae_model, config.vae)
    return run_stage("vae", config.vae, init_params, phases, streams.vae, (), workdir)


def polish_vae(config: PretrainConfig, streams: Streams, workdir: pathlib.Path) -> Params:
    """Trains the averaged autoencoder once more, with a schedule and an optimizer of its own."""
    step, params = load_average(workdir / "vae")
    say(f"polish: starts from vae step {step}")
    phases = _vae_phases(config.vae_model, config.polish)
    return run_stage("polish", config.polish, lambda: params, phases, streams.polish, (), workdir)


def train_decoder(config: PretrainConfig, streams: Streams, workdir: pathlib.Path) -> Params:
    """Trains the decoder further, from the polished average; the encoder stays as it is."""
    step, params = load_average(workdir / "polish")
    say(f"decoder: starts from polish step {step}")
    encoder, decoder = {"encoder": params["encoder"]}, {"decoder": params["decoder"]}
    phases = _vae_phases(config.vae_model, config.decoder, encoder)
    return run_stage(
        "decoder", config.decoder, lambda: decoder, phases, streams.decoder, (), workdir
    )


def load_vae(workdir: pathlib.Path) -> tuple[dict[str, int], Params]:
    """The steps by stage and the averaged parameters of the autoencoder, as far as it is."""
    step, params = load_average(workdir / "polish")
    decoder_step, decoder = 0, {"decoder": params["decoder"]}
    if (workdir / "decoder").exists():
        decoder_step, decoder = load_average(workdir / "decoder")
    steps = {"polish_step": step, "decoder_step": decoder_step}
    return steps, {"encoder": params["encoder"], **decoder}


def _vae_phases(
    model: vae.VaeConfig, stage: VaeStageConfig, frozen: Params | None = None
) -> list[Phase]:
    loss_fn = functools.partial(vae_loss_fn, model, stage, frozen=frozen or {})
    return [
        Phase(stage.short_steps, loss_fn(stage.short_batch_size, stage.short_frames)),
        Phase(stage.steps, loss_fn(stage.batch_size, moving_shapes.spec.NUM_FRAMES)),
    ]


def vae_loss_fn(
    model: vae.VaeConfig, stage: VaeStageConfig, clips: int, frames: int, frozen: Params
) -> LossFn:
    """loss(params, key, step): reconstruction of `clips` random clips of `frames` frames, KL.

    `frozen` holds the parts of the parameters that are not trained.
    """

    def loss_fn(params: Params, key: jax.Array, step: jax.Array):
        params = {**frozen, **params}
        clip_key, noise_key = jax.random.split(key)
        videos = random_clips(clip_key, clips, frames)
        mean, logvar = vae.encode(params, videos, model)
        # Full noise from the start hides the latents from a decoder that does not use them yet.
        n = stage.noise_warmup_steps
        warmup = jnp.minimum(1.0, step / n) if n else 1.0
        std = jnp.exp(0.5 * logvar) + stage.latent_noise * jax.lax.stop_gradient(jnp.std(mean))
        noise = warmup * std * jax.random.normal(noise_key, mean.shape)
        decoded = vae.decode(params, mean + noise, model)
        terms = reconstruction_terms(decoded, videos, stage.contrast_weight)
        terms["kl"] = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        loss = (
            stage.l1_weight * terms["l1"]
            + stage.l2_weight * terms["l2"]
            + stage.edge_weight * terms["edge"]
            + warmup * stage.kl_weight * terms["kl"]
        )
        return loss, {**terms, "latent_std": jnp.std(mean), "posterior_std": _rms_std(logvar)}

    return loss_fn


def random_clips(key: jax.Array, n: int, frames: int) -> jax.Array:
    """Clips of any combination, cut to `frames` frames at random: f32[n, frames, H, W, 3], ±1."""
    clip_key, cut_key = jax.random.split(key)
    videos = moving_shapes.render(moving_shapes.sample_parameters(clip_key, n, "all"))
    first = jax.random.randint(cut_key, (), 0, videos.shape[1] - frames + 1)
    return 2.0 * jax.lax.dynamic_slice_in_dim(videos, first, frames, axis=1) - 1.0


def reconstruction_terms(
    decoded: jax.Array, videos: jax.Array, contrast_weight: float
) -> dict[str, jax.Array]:
    """Weighted mean absolute and squared error of [B, F, H, W, 3], and that of differences.

    A pixel weighs 1 + contrast_weight times its distance from the mean colour of its frame: the
    background fills nine tenths of a frame, and a plain loss is content with nothing else. "edge"
    is the mean absolute error of the differences between neighbouring pixels.
    """
    chex.assert_rank([decoded, videos], 5)
    chex.assert_equal_shape([decoded, videos])
    contrast = jnp.abs(videos - jnp.mean(videos, axis=(2, 3), keepdims=True))
    weight = 1.0 + contrast_weight * jnp.mean(contrast, axis=-1, keepdims=True)
    weight = weight / jnp.mean(weight)
    error = decoded - videos
    across = jnp.mean(jnp.abs(jnp.diff(error, axis=3)))
    down = jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    return {
        "l1": jnp.mean(weight * jnp.abs(error)),
        "l2": jnp.mean(weight * jnp.square(error)),
        "edge": 0.5 * (across + down),
    }


def _rms_std(logvar: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.exp(logvar)))


# --- latents -------------------------------------------------------------------------------------


def encode_clips(config: PretrainConfig, key: jax.Array, workdir: pathlib.Path) -> LatentCache:
    """Encodes training clips with the polished autoencoder, or reads what an earlier run wrote."""
    folder = workdir / "latents"
    if not folder.exists():
        step, params = load_average(workdir / "polish")
        say(f"latents: encoding {config.latents.num_clips} clips, vae step {step}")
        cache = _encode(params, config.vae_model, config.latents, key)
        _write_latents(cache, folder)
    return _read_latents(folder)


def _encode(
    params: Params, model: vae.VaeConfig, stage: LatentsStageConfig, key: jax.Array
) -> LatentCache:
    index = {text: i for i, text in enumerate(moving_shapes.train_captions())}

    @jax.jit
    def encode_batch(key: jax.Array):
        clips = moving_shapes.sample_parameters(key, stage.batch_size, "train")
        mean, _ = vae.encode(params, 2.0 * moving_shapes.render(clips) - 1.0, model)
        return mean, clips

    latents, captions = [], []
    for batch_key in jax.random.split(key, stage.num_clips // stage.batch_size):
        mean, clips = encode_batch(batch_key)
        latents.append(np.asarray(mean))
        captions.extend(index[text] for text in moving_shapes.captions(clips))
    stacked = np.concatenate(latents)
    mean, std = stacked.mean(dtype=np.float64), stacked.std(dtype=np.float64)
    return LatentCache(stacked, np.array(captions, np.int32), float(mean), float(std))


def _write_latents(cache: LatentCache, folder: pathlib.Path) -> None:
    with folders.new_folder(folder, "latents") as new:
        np.save(new / "latents.npy", cache.latents)
        np.save(new / "caption.npy", cache.caption)
        summary = {"count": len(cache.caption), "mean": cache.mean, "std": cache.std}
        (new / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _read_latents(folder: pathlib.Path) -> LatentCache:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; run the stage latents first")
    summary = json.loads((folder / "summary.json").read_text())
    return LatentCache(
        np.load(folder / "latents.npy"),
        np.load(folder / "caption.npy"),
        summary["mean"],
        summary["std"],
    )


# --- flow ----------------------------------------------------------------------------------------


def train_flow(config: PretrainConfig, streams: Streams, workdir: pathlib.Path) -> Params:
    """Trains the transformer on the cached latents of the training captions."""
    data = flow_data(_read_latents(workdir / "latents"), config.transformer.text_embed_dim)

    def init_params() -> Params:
        return hunyuan_video.init_params(config.transformer, streams.flow_init)

    loss_fn = flow_loss_fn(config.transformer, config.flow)
    phases = [Phase(config.flow.steps, loss_fn)]
    return run_stage("flow", config.flow, init_params, phases, streams.flow, data, workdir)


def flow_data(cache: LatentCache, text_dim: int) -> FlowData:
    """Scales latents to unit spread and encodes the training captions and the empty prompt."""
    texts = [*moving_shapes.train_captions(), ""]
    text, mask = word_embeddings.encode_padded(texts, text_dim)
    latents = jnp.asarray(cache.latents / np.float32(cache.std))
    return FlowData(latents, jnp.asarray(cache.caption), jnp.asarray(text), jnp.asarray(mask))


def flow_loss_fn(model: hunyuan_video.HunyuanVideoConfig, stage: FlowStageConfig) -> LossFn:
    """loss(params, key, step, *FlowData): mean |v(z_sigma, sigma) - (z - x0)|², random batch."""

    def loss_fn(params: Params, key: jax.Array, step: jax.Array, *inputs: jax.Array):
        del step
        data = FlowData(*inputs)
        keys = jax.random.split(key, 4)
        clip = jax.random.randint(keys[0], (stage.batch_size,), 0, len(data.latents))
        clean = data.latents[clip]
        sigma = sample_sigma(keys[1], stage.batch_size, stage)
        noise = jax.random.normal(keys[2], clean.shape)
        noisy = clean + sigma[:, None, None, None, None] * (noise - clean)
        dropped = jax.random.bernoulli(keys[3], stage.caption_drop, (stage.batch_size,))
        row = jnp.where(dropped, len(data.text) - 1, data.caption[clip])
        condition = hunyuan_video.Condition(text=data.text[row], text_mask=data.mask[row])
        velocity = hunyuan_video.velocity(params, noisy, 1000.0 * sigma, condition, model)
        error_B = jnp.mean(jnp.square(velocity - (noise - clean)), axis=(1, 2, 3, 4))
        return jnp.mean(error_B), _by_sigma(error_B, sigma)

    return loss_fn


def sample_sigma(key: jax.Array, n: int, stage: FlowStageConfig) -> jax.Array:
    """Noise levels f32[n] in (0, 1): the logistic of a normal, shifted as the sampler shifts."""
    normal = stage.sigma_mean + stage.sigma_std * jax.random.normal(key, (n,))
    sigma = jax.nn.sigmoid(normal)
    return stage.shift * sigma / (1.0 + (stage.shift - 1.0) * sigma)


def _by_sigma(error_B: jax.Array, sigma: jax.Array) -> dict[str, jax.Array]:
    # The plain loss hides where it comes from: near sigma = 1 it is mostly irreducible.
    low = sigma < 0.5
    return {
        "error_low_sigma": jnp.sum(error_B * low) / jnp.maximum(jnp.sum(low), 1),
        "error_high_sigma": jnp.sum(error_B * ~low) / jnp.maximum(jnp.sum(~low), 1),
    }


# --- export --------------------------------------------------------------------------------------


def export(config: PretrainConfig, key: jax.Array, workdir: pathlib.Path) -> dict[str, float]:
    """Writes `workdir/weights/{vae,transformer}` and judges reconstructions and samples.

    Returns: the numbers that are also written to `workdir/report.json`.
    """
    summary = json.loads((workdir / "latents" / "summary.json").read_text())
    model = dataclasses.replace(config.vae_model, scaling_factor=1.0 / summary["std"])
    steps, vae_params = load_vae(workdir)
    flow_step, flow_params = load_average(workdir / "flow")
    for name, params, model_config in (
        ("vae", vae_params, model),
        ("transformer", flow_params, config.transformer),
    ):
        # Half the size of float32; the rounding (one part in 2048) is far below the models' errors.
        weights.save(
            params,
            workdir / "weights" / name,
            config=model_config,
            dtype=jnp.float16,
            overwrite=True,
        )
    steps["flow_step"] = flow_step
    say(f"export: {steps}")
    pipeline = pretraining_report.Pipeline(model, vae_params, config.transformer, flow_params)
    numbers = pretraining_report.judge(pipeline, config.report, key, workdir)
    numbers = {**steps, **numbers}
    files.write_atomically(workdir / "report.json", (json.dumps(numbers, indent=2) + "\n").encode())
    return numbers
