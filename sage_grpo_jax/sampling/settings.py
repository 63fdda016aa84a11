"""How videos are sampled: a recipe's values, overridden by flags, checked before any work."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from sage_grpo_jax.common import fields
from sage_grpo_jax.common.fields import bounded, choice
from sage_grpo_jax.config import schema
from sage_grpo_jax.flow import guidance as guidance_lib
from sage_grpo_jax.flow import schedules, sde
from sage_grpo_jax.models import frames, vae_tiling
from sage_grpo_jax.models.door import AutoencoderConfig, TransformerConfig
from sage_grpo_jax.policy import sampler
from sage_grpo_jax.policy.policy import Guidance

FORMATS = ("mp4", "gif", "both")
TILINGS = ("auto", *frames.TILINGS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """One set of samples. Each field has a flag of the same name, but fps and the last two.

    Attributes:
      sampler: ode, or a kind of `flow.sde` that injects noise.
      steps: denoising steps T.
      shift: of the noise schedule.
      guidance: scale of classifier-free guidance; 1 runs the model once a step.
      eta: noise level; ode ignores it.
      frames, height, width: of a clip, in pixels.
      fps: at which the clip is to be shown.
      tiling: off, or whose overlap of VAE tiles: official (1/8), diffusers (1/4).
      format: mp4, gif or both.
      last_step: whether a stochastic sampler's last step injects noise, as in training.
      guidance_mode: both branches in one batch, or one after the other in less memory.
      clamp: of the sampler, see `flow.sde.step_coefficients`; the recipe's where it is its sampler.
    """

    sampler: str = choice(values=sde.KINDS)
    steps: int = bounded(least=1, most=1000)
    shift: float = bounded(least=0.1, most=20)
    guidance: float = bounded(least=0)
    eta: float = bounded(least=0, most=sde.HIGHEST_ETA)
    frames: int = bounded(least=1)
    height: int = bounded(least=1)
    width: int = bounded(least=1)
    fps: float = bounded(above=0)
    tiling: str = choice(values=TILINGS)
    format: str = choice("mp4", FORMATS)
    last_step: str = choice("deterministic", sde.LAST_STEPS)
    guidance_mode: str = choice("batch", guidance_lib.MODES)
    clamp: float = bounded(0.0, least=0, most=sde.HIGHEST_CLAMP)

    @property
    def schedule(self) -> schedules.Schedule:
        return schedules.make_schedule(self.steps, self.shift)

    @property
    def stochastic(self) -> np.ndarray:
        """bool [T]: the steps that inject noise."""
        return sde.stochastic_steps(
            self.sampler, self.schedule, self.eta, self.last_step, clamp=self.clamp
        )

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files of a clip, the main one first."""
        return ("mp4", "gif") if self.format == "both" else (self.format,)

    def sampling(self, vae: AutoencoderConfig, precision: str) -> sampler.Sampling:
        """What the sampler needs of it.

        Args:
          vae: its config decides the shape of the latents.
          precision: of float32 matmuls: highest, high or default.
        """
        return sampler.Sampling(
            schedule=self.schedule,
            latent_shape=frames.latent_shape(vae, self.frames, self.height, self.width),
            kind=self.sampler,
            eta=self.eta,
            clamp=self.clamp,
            stochastic=self.stochastic,
            guidance=Guidance(self.guidance, self.guidance_mode, precision),
            tiling=self.tiling,
        )


def from_config(config: schema.Config, **given: Any) -> Settings:
    """The recipe's settings of its evaluation, with those that are `given` and not None.

    Raises:
      ValueError: naming the flag, the value and what is allowed.
    """
    rollout, video = config.rollout, config.video
    values = {
        "sampler": "ode",
        "steps": config.eval.num_steps,
        "shift": rollout.shift,
        "guidance": rollout.guidance,
        "eta": rollout.eta,
        "frames": video.frames,
        "height": video.height,
        "width": video.width,
        "fps": video.fps,
        "tiling": config.model.vae_tiling,
        "last_step": rollout.last_step,
        "guidance_mode": rollout.guidance_mode,
    }

    # What depends on other values: the clamp is of the recipe's own sampler, and clips larger than
    # a tile are decoded in tiles.
    values |= {name: value for name, value in given.items() if value is not None}
    if values["sampler"] == rollout.sde:
        values["clamp"] = rollout.clamp
    if values["tiling"] == "auto":
        larger = max(values["height"], values["width"]) > vae_tiling.TILE
        values["tiling"] = "official" if larger else "off"

    settings = Settings(**values)
    _check(settings)
    if not sde.KINDS[settings.sampler].stochastic:  # so that equal videos have equal records
        settings = dataclasses.replace(settings, eta=0.0)
    return settings


def _check(settings: Settings) -> None:
    fields.check(settings, "--")
    # An eta above its highest has no meaning for a sampler.
    highest_eta = sde.KINDS[settings.sampler].highest_eta
    if settings.eta > highest_eta:
        raise ValueError(f"--eta: got {settings.eta}; allowed: 0 to {highest_eta}")


def check_clip(settings: Settings, transformer: TransformerConfig, vae: AutoencoderConfig) -> None:
    """Checks the size of the clips and of the tiles against the networks.

    Raises:
      ValueError: naming the flag, the value and what is allowed.
    """
    frames.check_clip(
        transformer,
        vae,
        settings.frames,
        settings.height,
        settings.width,
        lambda field: f"--{field}",
    )
    if settings.tiling != "off":
        try:
            vae_tiling.check_tile(vae, vae_tiling.TILE, vae_tiling.OVERLAPS[settings.tiling])
        except ValueError as error:
            raise ValueError(f"--tiling: got {settings.tiling}; {error}") from error


def parse_seeds(texts: list[str]) -> list[int]:
    """The seeds of a comma-separated flag.

    Raises:
      ValueError: something that is not a whole number from 0 to 2³² - 1, twice the same, or none.
    """
    allowed = "allowed: whole numbers from 0 to 4294967295, each once"
    # Not isdigit, which takes other scripts' digits and powers.
    if not texts or not all(re.fullmatch(r"0*[0-9]{1,10}", text.strip()) for text in texts):
        raise ValueError(f"--seeds: got {','.join(texts)[:100]!r}; {allowed}")
    seeds = [int(text) for text in texts]
    if len(set(seeds)) < len(seeds) or max(seeds) >= 2**32:
        raise ValueError(f"--seeds: got {','.join(texts)!r}; {allowed}")
    return seeds
