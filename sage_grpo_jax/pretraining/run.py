"""Pretraining on the moving-shapes world: autoencoder, latents, flow matching, export.

Eight stages, each of which continues where it was interrupted:

  vae      reconstruction of random clips (every combination of parameters) plus a small KL term
  polish   the same from its averaged weights, on whole clips only
  decoder  the decoder alone, for the encoder as it then is
  latents  encodes clips of the training combinations once; their spread fixes `scaling_factor`
  flow     rectified flow matching of the transformer on those latents
  distill  the transformer learns the velocity that guidance makes of its own predictions
  sharpen  the decoder once more, on latents that this transformer has denoised
  export   writes the averaged weights and samples validation captions

"decoder" does not touch the latents: it may run at the same time as "flow" and "distill".
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sage_grpo_jax import weights
from sage_grpo_jax.common import files, folders
from sage_grpo_jax.models import registry
from sage_grpo_jax.models.door import AutoencoderConfig
from sage_grpo_jax.pretraining import report as pretraining_report
from sage_grpo_jax.pretraining.flow_stages import (
    LatentCache,
    distill_guidance,
    load_transformer,
    train_flow,
)
from sage_grpo_jax.pretraining.loop import Params, Streams, load_average, say
from sage_grpo_jax.pretraining.settings import LatentsStageConfig, PretrainConfig
from sage_grpo_jax.pretraining.vae_stages import (
    load_vae,
    polish_vae,
    sharpen_decoder,
    train_decoder,
    train_vae,
)
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes

STAGES = ("vae", "polish", "decoder", "latents", "flow", "distill", "sharpen", "export")
# What a pretraining writes into its folder.
NAMES = (
    "config.json",
    "metrics.jsonl",
    "report.json",
    *(f"{stage}/*" for stage in STAGES if stage != "export"),
    "weights/*",
    *("real.png", "reconstructions.png", "samples_*_steps.png"),
)


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
    # A key for every use, whatever is run: a stage alone draws what it would draw among all.
    streams = Streams(*jax.random.split(jax.random.key(config.seed), len(Streams._fields)))

    # The autoencoder.
    if "vae" in stages:
        train_vae(config, streams, workdir)
    if "polish" in stages:
        polish_vae(config, streams, workdir)
    if "decoder" in stages:
        train_decoder(config, streams, workdir)

    # The transformer, on latents that never change again.
    if "latents" in stages:
        encode_clips(config, streams.latents, workdir)
    if "flow" in stages:
        train_flow(config, streams, _read_latents(workdir / "latents"), workdir)
    if "distill" in stages:
        distill_guidance(config, streams, _read_latents(workdir / "latents"), workdir)

    # The decoder for this transformer, then all of it as it stands.
    if "sharpen" in stages:
        std = _read_latents(workdir / "latents").std
        _, transformer = load_transformer(workdir)
        sharpen_decoder(config, streams, workdir, transformer, std)
    if "export" in stages:
        export(config, streams.report, workdir)


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
    params: Params, model: AutoencoderConfig, stage: LatentsStageConfig, key: jax.Array
) -> LatentCache:
    # The row of every caption, as `flow_data` encodes them.
    index = {text: i for i, text in enumerate(moving_shapes.train_captions())}
    vae = registry.of(model)

    @jax.jit
    def encode_batch(key: jax.Array) -> tuple[jax.Array, moving_shapes.ClipParameters]:
        clips = moving_shapes.sample_parameters(key, stage.batch_size, "train")
        mean, _ = vae.encode(params, 2.0 * moving_shapes.render(clips) - 1.0, model)
        return mean, clips

    # Rendered, encoded and moved to the host batch by batch.
    latents, captions = [], []
    for batch_key in jax.random.split(key, stage.num_clips // stage.batch_size):
        mean, clips = encode_batch(batch_key)
        latents.append(np.asarray(mean))
        captions.extend(index[text] for text in moving_shapes.captions(clips))

    # [N, T, H, W, C]. Sums of millions of float32 are taken in float64.
    stacked = np.concatenate(latents)
    mean, std = stacked.mean(dtype=np.float64), stacked.std(dtype=np.float64)
    return LatentCache(stacked, np.array(captions, np.int32), float(mean), float(std))


def _write_latents(cache: LatentCache, folder: pathlib.Path) -> None:
    # The folder appears whole: its being there means that the stage is finished.
    with folders.new_folder(folder, "latents") as new:
        np.save(new / "latents.npy", cache.latents)
        np.save(new / "caption.npy", cache.caption)
        summary = {"count": len(cache.caption), "mean": cache.mean, "std": cache.std}
        (new / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _read_latents(folder: pathlib.Path) -> LatentCache:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; run the stage latents first")
    # The spread of the latents joins the models: the transformer sees them divided by it.
    summary = json.loads((folder / "summary.json").read_text())
    return LatentCache(
        np.load(folder / "latents.npy"),
        np.load(folder / "caption.npy"),
        summary["mean"],
        summary["std"],
    )


# --- export --------------------------------------------------------------------------------------


def export(config: PretrainConfig, key: jax.Array, workdir: pathlib.Path) -> dict[str, float]:
    """Writes `workdir/weights/{vae,transformer}` and judges reconstructions and samples.

    Returns:
      The numbers that are also written to `workdir/report.json`.
    """
    summary = json.loads((workdir / "latents" / "summary.json").read_text())
    model = dataclasses.replace(config.vae_model, scaling_factor=1.0 / summary["std"])
    steps, vae_params = load_vae(workdir)
    flow_steps, flow_params = load_transformer(workdir)

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

    # Judged in float32: the rounding is not seen here.
    steps |= flow_steps
    say(f"export: {steps}")
    pipeline = pretraining_report.Pipeline(model, vae_params, config.transformer, flow_params)
    numbers = pretraining_report.judge(pipeline, config.report, key, workdir)
    numbers = {**steps, **numbers}
    files.write_atomically(workdir / "report.json", (json.dumps(numbers, indent=2) + "\n").encode())
    return numbers
