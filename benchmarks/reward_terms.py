"""Does a policy exploit the moving-shapes rewards? Prints every error that they are made of.

    python benchmarks/reward_terms.py --run=runs/quickstart-sage

Real clips, their reconstructions by the shipped autoencoder, samples of the shipped model and of a
run, all of the same test captions. An error of the run below that of real clips, or edges sharper
than theirs, would be an exploit: no improvement of a video goes beyond the data. Takes a minute.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import ml_collections
import numpy as np

from sage_grpo_jax.config import builder, methods
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.pretraining import report as pretraining_report
from sage_grpo_jax.rewards.backends import moving_shapes as backend
from sage_grpo_jax.training.blueprint import Blueprint
from sage_grpo_jax.worlds.moving_shapes import recognition as shape_recognition
from sage_grpo_jax.worlds.moving_shapes import world as moving_shapes

COUNT, STEPS, SEED = 144, 20, 1


def clips(run: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """uint8 clips by what made them, and the captions of each set."""
    # The config that the run recorded.
    values = json.loads((run / "config.json").read_text())
    values["method"] = methods.Applied(values["method"])  # the record of a run: its preset
    config = builder.from_config_dict(ml_collections.ConfigDict(values))
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    blueprint = Blueprint.read(config, mesh)
    networks = blueprint.networks

    # The same captions and the same noise for all sets.
    captions = pretraining_report.spread(moving_shapes.split_captions("test"), COUNT)
    with jax.set_mesh(mesh):
        vae_params = blueprint.load_vae()
        policies = {
            "before": blueprint.load_transformer(),
            "after": blueprint.load_policy(run)[0],
        }
        key = jax.random.key(SEED)
        real = moving_shapes.render(moving_shapes.parameters_from_captions(captions, key))
        found = {"real clips": real}
        for name, params in policies.items():
            pipeline = pretraining_report.Pipeline(
                networks.vae, vae_params, networks.transformer, params
            )
            if name == "before":
                found["reconstructions"] = pretraining_report.reconstruct(pipeline, real)
            shift = config.rollout.shift
            found[name] = pretraining_report.sample(pipeline, captions, STEPS, shift, SEED)
    return {name: moving_shapes.to_uint8(videos) for name, videos in found.items()}, captions


def edge_width(video: np.ndarray) -> float:
    """How soft outlines are: pixels on a ramp for each pixel of outline; real clips have 0.76.

    The integral of 4·c·(1 - c) over the coverage c across an outline, measured without any of the
    rewards' code: the coverage is the distance from the background in units of the largest one.
    """
    # The largest distance but for half a percent of outliers stands for full coverage.
    pixels = video.astype(np.float64) / 255
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    coverage = np.clip(distance / np.quantile(distance, 0.995), 0, 1)
    # The circumference of a disk of this area.
    outline = 2 * np.sqrt(np.pi * coverage.sum((1, 2)) + 1e-6)
    return float(np.mean((4 * coverage * (1 - coverage)).sum((1, 2)) / outline))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, required=True, help="Workdir of a run.")
    sets, captions = clips(parser.parse_args().run)
    rows: dict[str, list[float]] = {}
    for videos in sets.values():
        # The errors one by one, at the world's 8 frames a second.
        errors = [backend.measure(v, c, 8.0) for v, c in zip(videos, captions, strict=True)]
        for name, term in backend.TERMS.items():
            rows.setdefault(f"{term.reward} {name}", []).append(np.mean([e[name] for e in errors]))

        # The rewards that they add up to.
        scores = [
            backend.MovingShapesBackend().score(v, c, 8.0)
            for v, c in zip(videos, captions, strict=True)
        ]
        for name in backend.MovingShapesBackend.names:
            mean = np.mean([score[name].normalised for score in scores])
            rows.setdefault(f"**{name}**", []).append(mean)

        # What no reward reads.
        rows.setdefault("edge width, pixels", []).append(np.mean([edge_width(v) for v in videos]))
        identity = shape_recognition.identity(videos, captions)
        rows.setdefault("clips right throughout", []).append(identity.clips)
    print(f"| | {' | '.join(sets)} |")
    print("|---" * (len(sets) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")


if __name__ == "__main__":
    main()
