"""The stages of pretraining that make the transformer: flow matching, its own guidance learned."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import TransformerConfig
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
from sage_grpo_jax.pretraining.settings import DistillStageConfig, FlowStageConfig, PretrainConfig
from sage_grpo_jax.worlds.moving_shapes import spec, word_embeddings
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes


class LatentCache(NamedTuple):
    """Encoded training clips, not yet scaled, and the captions that they show."""

    latents: np.ndarray  # f32[N, T, H, W, C]
    caption: np.ndarray  # int32[N], an index into moving_shapes.train_captions()
    mean: float
    std: float


class FlowData(NamedTuple):
    """What a flow-matching update draws from; the last row of text is the empty prompt.

    `rivals` are the rows of two captions that say another shape and are the same otherwise.
    """

    latents: jax.Array  # f32[N, T, H, W, C], scaled to unit spread
    caption: jax.Array  # int32[N]
    text: jax.Array  # f32[K + 1, L, D]
    mask: jax.Array  # bool[K + 1, L]
    rivals: jax.Array  # int32[K + 1, 2]


class NoisyBatch(NamedTuple):
    """Clips on their way from data to noise, with captions, some of them dropped."""

    noisy: jax.Array  # f32[B, T, H, W, C]
    sigma: jax.Array  # f32[B]
    target: jax.Array  # z - x0, as noisy
    row: jax.Array  # int32[B], into FlowData.text


def train_flow(
    config: PretrainConfig, streams: Streams, cache: LatentCache, workdir: pathlib.Path
) -> Params:
    """Trains the transformer on the cached latents of the training captions."""
    # Data go in as arguments: captured by the program, they would be constants compiled into it.
    data = flow_data(cache, text_width(config.transformer))

    def init_params() -> Params:
        model = registry.of(config.transformer)
        return model.init_params(config.transformer, streams.flow_init)

    loss_fn = flow_loss_fn(config.transformer, config.flow)
    phases = [Phase(config.flow.steps, loss_fn)]
    return run_stage("flow", config.flow, init_params, phases, streams.flow, data, workdir)


def distill_guidance(
    config: PretrainConfig, streams: Streams, cache: LatentCache, workdir: pathlib.Path
) -> Params:
    """Teaches the transformer the velocity that guidance makes of its own predictions.

    One pass then gives what takes several with guidance, as in the released `distilled` variants.
    Besides the guidance away from the empty prompt there is one away from the
    captions of other shapes: at this size disks and squares differ in so few latent values that
    flow matching alone hardly tells them apart.
    """
    step, params = load_average(workdir / "flow")
    say(f"distill: starts from flow step {step}")
    # The update gives the buffers of what it trains away; the teacher keeps its own.
    teacher = jax.tree.map(jnp.copy, params)
    inputs = (teacher, *flow_data(cache, text_width(config.transformer)))
    phases = [Phase(config.distill.steps, distill_loss_fn(config.transformer, config.distill))]
    return run_stage(
        "distill", config.distill, lambda: params, phases, streams.distill, inputs, workdir
    )


def load_transformer(workdir: pathlib.Path) -> tuple[dict[str, int], Params]:
    """The steps by stage and the averaged parameters of the transformer, as far as it is."""
    step, params = load_average(workdir / "flow")
    steps = {"flow_step": step, "distill_step": 0}
    if (workdir / "distill").exists():
        steps["distill_step"], params = load_average(workdir / "distill")
    return steps, params


def text_width(transformer: TransformerConfig) -> int:
    """The width of the text embeddings that a transformer takes."""
    return registry.of(transformer).embedding_needs(transformer).text


def flow_data(cache: LatentCache, text_dim: int) -> FlowData:
    """Scales latents to unit spread and encodes the training captions and the empty prompt."""
    # The empty prompt stands for "no caption"; it is the last row, which `noisy_batch` relies on.
    texts = [*moving_shapes.train_captions(), ""]
    text, mask = word_embeddings.encode_padded(texts, text_dim)
    latents = jnp.asarray(cache.latents / np.float32(cache.std))
    rivals = jnp.asarray(rival_rows(texts))
    caption = jnp.asarray(cache.caption)
    return FlowData(latents, caption, jnp.asarray(text), jnp.asarray(mask), rivals)


def rival_rows(texts: list[str]) -> np.ndarray:
    """Where the two captions stand that say another shape, int32[N, 2].

    One that is not in the list (training knows no held-out ones) is replaced by the other; the
    empty prompt has itself.
    """
    # A caption has two rivals; held-out ones were never encoded and have no row.
    row = {text: i for i, text in enumerate(texts)}
    rivals = []
    for i, text in enumerate(texts):
        found = [row[other] for other in _other_shapes(text) if other in row] or [i]
        rivals.append((found[0], found[-1]))
    return np.array(rivals, np.int32)


def _other_shapes(text: str) -> list[str]:
    if not text:
        return []
    words = spec.parse_caption(text)
    shapes = [shape for shape in spec.SHAPES if shape != words.shape]
    return [spec.caption(words._replace(shape=shape)) for shape in shapes]


def flow_loss_fn(model: TransformerConfig, stage: FlowStageConfig) -> LossFn:
    """loss(params, key, step, *FlowData): mean |v(z_sigma, sigma) - (z - x0)|², random batch."""

    def loss_fn(params: Params, key: jax.Array, step: jax.Array, *inputs: jax.Array) -> Loss:
        del step
        data = FlowData(*inputs)
        batch = noisy_batch(key, data, stage)
        velocity = _velocity(params, batch.noisy, batch.sigma, batch.row, data, model)
        error_B = weighted_error(velocity - batch.target, stage.first_frame_weight)
        return jnp.mean(error_B), _by_sigma(error_B, batch.sigma)

    return loss_fn


def distill_loss_fn(model: TransformerConfig, stage: DistillStageConfig) -> LossFn:
    """loss(params, key, step, teacher, *FlowData): mean |v - guided_target(c, u, r)|².

    c, u and r are the teacher's velocities with the caption, with the empty prompt and with the
    caption of another shape (one of two at random, so that what is learned is their mean); where
    the caption is dropped all three are the same, so that the empty prompt keeps its meaning.
    """

    def loss_fn(
        params: Params, key: jax.Array, step: jax.Array, teacher: Params, *inputs: jax.Array
    ) -> Loss:
        del step
        # The teacher's three velocities in one pass of 3 B samples.
        data = FlowData(*inputs)
        batch = noisy_batch(key, data, stage)
        empty = jnp.full_like(batch.row, len(data.text) - 1)
        which = jax.random.randint(jax.random.fold_in(key, 1), batch.row.shape, 0, 2)
        rows = jnp.concatenate([batch.row, empty, data.rivals[batch.row, which]])
        thrice = (jnp.concatenate([x] * 3) for x in (batch.noisy, batch.sigma))
        velocities = jnp.split(_velocity(teacher, *thrice, rows, data, model), 3)

        # The student sees the caption only.
        target = jax.lax.stop_gradient(guided_target(*velocities, stage))
        velocity = _velocity(params, batch.noisy, batch.sigma, batch.row, data, model)
        error_B = weighted_error(velocity - target, stage.first_frame_weight)
        return jnp.mean(error_B), _by_sigma(error_B, batch.sigma)

    return loss_fn


def guided_target(
    captioned: jax.Array, plain: jax.Array, rival: jax.Array, stage: DistillStageConfig
) -> jax.Array:
    """u + guidance·(c - u) + contrast·(c - r): away from no caption, and from another shape's."""
    guided = plain + stage.guidance * (captioned - plain)
    return guided + stage.contrast * (captioned - rival)


def noisy_batch(key: jax.Array, data: FlowData, stage: FlowStageConfig) -> NoisyBatch:
    """Random clips at random noise levels, with their captions or, now and then, the empty one."""
    # x_σ = (1 - σ) x0 + σ z, whose derivative by σ is the target z - x0.
    keys = jax.random.split(key, 4)
    clip = jax.random.randint(keys[0], (stage.batch_size,), 0, len(data.latents))
    clean = data.latents[clip]
    sigma = sample_sigma(keys[1], stage.batch_size, stage)
    noise = jax.random.normal(keys[2], clean.shape)
    noisy = clean + sigma[:, None, None, None, None] * (noise - clean)

    dropped = jax.random.bernoulli(keys[3], stage.caption_drop, (stage.batch_size,))
    row = jnp.where(dropped, len(data.text) - 1, data.caption[clip])
    return NoisyBatch(noisy, sigma, noise - clean, row)


def weighted_error(difference: jax.Array, first_frame_weight: float) -> jax.Array:
    """Mean square f32[B] of f32[B, T, H, W, C], the first latent frame weighted; weights mean 1."""
    frames = difference.shape[1]
    # The first latent frame holds one frame of the video, the others four each.
    weight_T = jnp.ones(frames).at[0].set(first_frame_weight)
    error_BxT = jnp.mean(jnp.square(difference), axis=(2, 3, 4))
    return jnp.mean(error_BxT * weight_T / jnp.mean(weight_T), axis=1)


def _velocity(
    params: Params,
    noisy: jax.Array,
    sigma: jax.Array,
    row: jax.Array,
    data: FlowData,
    model: TransformerConfig,
) -> jax.Array:
    # Every sample reads its own caption; the model counts noise from 0 to 1000.
    prompts = {"text": data.text[row], "text_mask": data.mask[row]}
    condition = registry.of(model).make_condition(prompts, model, noisy.shape[1])
    return registry.of(model).velocity(params, noisy, 1000.0 * sigma, condition, model)


def sample_sigma(key: jax.Array, n: int, stage: FlowStageConfig) -> jax.Array:
    """Noise levels f32[n] in (0, 1): the logistic of a normal, shifted as the sampler shifts."""
    # The logistic of a normal is dense in the middle, where there is most to learn; the shift moves
    # it towards noise, as that of the sampler does.
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
