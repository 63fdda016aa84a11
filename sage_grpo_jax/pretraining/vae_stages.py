"""The stages of pretraining that make the autoencoder: vae, polish, decoder, sharpen."""

import functools
import pathlib
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import AutoencoderConfig
from sage_grpo_jax.pretraining.loop import (
    Loss,
    LossFn,
    Params,
    Phase,
    Streams,
    load_average,
    run_stage,
    say,
)
from sage_grpo_jax.pretraining.settings import PretrainConfig, VaeStageConfig
from sage_grpo_jax.worlds.moving_shapes import word_embeddings
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes


def train_vae(config: PretrainConfig, streams: Streams, workdir: pathlib.Path) -> Params:
    """Trains the autoencoder on clips that are drawn and rendered inside each update."""

    def init_params() -> Params:
        return registry.of(config.vae_model).init_params(config.vae_model, streams.vae_init)

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


def sharpen_decoder(
    config: PretrainConfig,
    streams: Streams,
    workdir: pathlib.Path,
    transformer: Params,
    latent_std: float,
) -> Params:
    """Trains the decoder once more, on latents with the errors that the transformer makes.

    Args:
      transformer: parameters of the transformer that will be sampled with this decoder.
      latent_std: spread of the latents, by which the transformer sees them divided.
    """
    _, params = load_vae(workdir, ("decoder",))
    say("sharpen: starts from the decoder as it is")
    loss_fn = sharpen_loss_fn(config, {"encoder": params["encoder"]}, transformer, latent_std)
    phases = [Phase(config.sharpen.steps, loss_fn)]
    decoder = {"decoder": params["decoder"]}
    return run_stage(
        "sharpen", config.sharpen, lambda: decoder, phases, streams.sharpen, (), workdir
    )


def load_vae(
    workdir: pathlib.Path, stages: tuple[str, ...] = ("decoder", "sharpen")
) -> tuple[dict[str, int], Params]:
    """The steps by stage and the averaged parameters of the autoencoder, as far as it is.

    Args:
      stages: of the decoder alone, that are looked for; the last one that has begun is taken.
    """
    step, params = load_average(workdir / "polish")
    steps = {"polish_step": step}
    for stage in stages:
        steps[f"{stage}_step"] = 0
        if (workdir / stage).exists():
            steps[f"{stage}_step"], decoder = load_average(workdir / stage)
            params = {**params, **decoder}
    return steps, params


def _vae_phases(
    model: AutoencoderConfig, stage: VaeStageConfig, frozen: Params | None = None
) -> list[Phase]:
    # Short clips first: they cost less, and pixels are learned before motion.
    loss_fn = functools.partial(vae_loss_fn, model, stage, frozen=frozen or {})
    return [
        Phase(stage.short_steps, loss_fn(stage.short_batch_size, stage.short_frames)),
        Phase(stage.steps, loss_fn(stage.batch_size, moving_shapes.spec.NUM_FRAMES)),
    ]


def vae_loss_fn(
    model: AutoencoderConfig, stage: VaeStageConfig, clips: int, frames: int, frozen: Params
) -> LossFn:
    """loss(params, key, step): reconstruction of `clips` random clips of `frames` frames, KL.

    `frozen` holds the parts of the parameters that are not trained.
    """
    vae = registry.of(model)

    def loss_fn(params: Params, key: jax.Array, step: jax.Array) -> Loss:
        # Clips that no update sees again: [B, F, H, W, 3] in ±1.
        params = {**frozen, **params}
        clip_key, noise_key = jax.random.split(key)
        videos = random_clips(clip_key, clips, frames)
        mean, logvar = vae.encode(params, videos, model)

        # Full noise from the start hides the latents from a decoder that does not use them yet.
        n = stage.noise_warmup_steps
        warmup = jnp.minimum(1.0, step / n) if n else 1.0
        std = jnp.exp(0.5 * logvar) + stage.latent_noise * jax.lax.stop_gradient(jnp.std(mean))
        noise = warmup * std * jax.random.normal(noise_key, mean.shape)

        # KL of the posterior against a standard normal, its mean over the elements.
        decoded = vae.decode(params, mean + noise, model)
        terms = reconstruction_terms(decoded, videos, stage.contrast_weight)
        terms["kl"] = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        loss = _weighted(terms, stage) + warmup * stage.kl_weight * terms["kl"]
        return loss, {**terms, "latent_std": jnp.std(mean), "posterior_std": _rms_std(logvar)}

    return loss_fn


def sharpen_loss_fn(
    config: PretrainConfig, encoder: Params, transformer: Params, latent_std: float
) -> LossFn:
    """loss(params, key, step): reconstruction from latents that a transformer has denoised.

    The latents of every other clip are noised to a level of up to `max_sigma` and denoised by the
    transformer in `denoising_steps` steps, which errs as it does in sampling: towards what it takes
    for likely. The decoder learns which clip that stands for. The others get a little noise.
    """
    model, stage = config.vae_model, config.sharpen
    vae, dit = registry.of(model), registry.of(config.transformer)
    # All captions of the world, in the order of `all_words`.
    captions = [moving_shapes.spec.caption(words) for words in moving_shapes.spec.all_words()]
    text_width = dit.embedding_needs(config.transformer).text
    encoded = word_embeddings.encode_padded(captions, text_width)
    text, mask = (jnp.asarray(array) for array in encoded)

    choices = tuple(len(words) for words in moving_shapes.spec.CHOICES)

    def loss_fn(params: Params, key: jax.Array, step: jax.Array) -> Loss:
        del step
        # Clips, and their latents in the units of the transformer.
        keys, count = jax.random.split(key, 3), stage.batch_size
        clips = moving_shapes.sample_parameters(keys[0], count, "all")
        videos = 2.0 * moving_shapes.render(clips) - 1.0
        mean, _ = vae.encode({**encoder, **params}, videos, model)
        clean = mean / latent_std

        # Every other clip goes through the transformer. The first six parameters of a clip are
        # places among the choices: together they count the row of its caption. (`mode` says what
        # becomes of a place that is none; there is no such place.)
        noise = jax.random.normal(keys[2], clean.shape)
        row = jnp.ravel_multi_index(tuple(clips[: len(choices)]), choices, mode="clip")[::2]
        prompts = {"text": text[row], "text_mask": mask[row]}
        condition = dit.make_condition(prompts, config.transformer, clean.shape[1])
        sigma = jax.random.uniform(keys[1], (len(row),), maxval=stage.max_sigma)

        def velocity(noisy: jax.Array, level: jax.Array) -> jax.Array:
            return dit.velocity(transformer, noisy, 1000.0 * level, condition, config.transformer)

        # The decoder alone learns: gradients end at the latents.
        denoised = _denoise(velocity, clean[::2], noise[::2], sigma, stage.denoising_steps)
        latents = (clean + stage.latent_noise * noise).at[::2].set(denoised)
        decoded = vae.decode(params, jax.lax.stop_gradient(latents) * latent_std, model)

        terms = reconstruction_terms(decoded, videos, stage.contrast_weight)
        return _weighted(terms, stage), terms

    return loss_fn


def _denoise(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    clean: jax.Array,
    noise: jax.Array,
    sigma_B: jax.Array,
    steps: int,
) -> jax.Array:
    """Latents noised to sigma and brought back by Euler steps of one length."""
    # dx/dσ is the velocity, so a step of Euler's from σ to σ - σ/steps takes off σ/steps times it.
    level = sigma_B[:, None, None, None, None]
    latents = clean + level * (noise - clean)
    for step in range(steps):
        left = 1.0 - step / steps
        latents -= level / steps * velocity(latents, left * sigma_B)
    return latents


def _weighted(terms: dict[str, jax.Array], stage: VaeStageConfig) -> jax.Array:
    """The reconstruction loss of `reconstruction_terms`."""
    return (
        stage.l1_weight * terms["l1"]
        + stage.l2_weight * terms["l2"]
        + stage.edge_weight * terms["edge"]
    )


def random_clips(key: jax.Array, n: int, frames: int) -> jax.Array:
    """Clips of any combination, cut to `frames` frames at random: f32[n, frames, H, W, 3], ±1."""
    # One cut for all clips: the length is fixed, the place is drawn.
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
    # Weights [B, F, H, W, 1] of mean 1.
    contrast = jnp.abs(videos - jnp.mean(videos, axis=(2, 3), keepdims=True))
    weight = 1.0 + contrast_weight * jnp.mean(contrast, axis=-1, keepdims=True)
    weight = weight / jnp.mean(weight)

    # Across and down: differences of the error are errors of the differences.
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
