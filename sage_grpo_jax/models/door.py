"""The door for models: what a transformer and an autoencoder must have to be trained and sampled.

A model is a module with these names; trainer, sampler, converter and adapters use nothing else of
it. `models.registry` says which there are. docs/extending.md shows how to add one.

Latents are channels last [B, T, H, W, C], masks are True where something counts, and all functions
are pure functions of arrays that jit can trace, with configs as static arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax


class EmbeddingNeeds(NamedTuple):
    """What embeddings a transformer can be conditioned on; widths as in the embedding cache.

    Attributes:
      text: width of the text embeddings.
      byt5: width of the embeddings of quoted text; None: it takes none.
      image: width of the embeddings of a first frame; None: it takes none.
      encoder: name of the text encoder that the released weights were trained with.
      first_frame: whether the released weights want a first frame (image-to-video).
      text_tokens: the most that the encoder gives for a prompt.
    """

    text: int
    byt5: int | None = None
    image: int | None = None
    encoder: str | None = None
    first_frame: bool = False
    text_tokens: int = 512


class TransformerConfig(Protocol):
    """A frozen, hashable dataclass: the fields of diffusers' config.json, then how it is run."""

    # How it is run.
    dtype: str  # of matmuls and activations: float32 | bfloat16
    attention: str  # one of `models.attention.IMPLEMENTATIONS`
    remat: bool  # recompute each block in the backward pass
    unroll: bool  # lay the blocks out instead of scanning over them

    @property
    def hidden_size(self) -> int:
        """The width of the tokens; no adapter has a higher rank."""
        ...

    @property
    def attention_head_dim(self) -> int:
        """The width of a head; attention kernels exist for some widths only."""
        ...

    @property
    def out_channels(self) -> int:
        """Channels of the latents, as in its autoencoder."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers that are stacked on the first axis of the parameters below `blocks`."""
        ...

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents that make a token along time, height and width; they divide a clip's latents."""
        ...

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> TransformerConfig:
        """From the object in diffusers' config.json; ValueError: a line with field and value."""
        ...

    def to_json(self) -> str:
        """The text of diffusers' config.json."""
        ...


class VideoModel(Protocol):
    """A module whose transformer gives the velocity of the latents."""

    NAME: str  # in messages
    Config: type  # a `TransformerConfig`
    # Released variants: all fields of their configs, with how they are run at the defaults.
    RELEASED: Mapping[str, Any]
    # Fields in which weights must agree with the variant of the recipe.
    VARIANT_FIELDS: tuple[str, ...]
    # For each of `lora.TARGETS`, the dense layers that it stands for, as blocks/mlp/in; or none.
    ADAPTER_TARGETS: Mapping[str, tuple[str, ...]]
    # Every dense layer that can be adapted, those above included; a config may lack some.
    ADAPTER_LAYERS: tuple[str, ...]

    def init_params(self, config: Any, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters as nested dicts; works under `jax.eval_shape`.

        Layers that are repeated are stacked on a leading axis below a key `blocks`: adapters,
        optimizer and weight tables go by that name.
        """
        ...

    def partition_names(self, config: Any) -> dict[str, Any]:
        """The tree of `init_params`; at each leaf a tuple of logical axis names, or None.

        `parallel.sharding` says which names there are.
        """
        ...

    def velocity(
        self,
        params: Any,
        latents: jax.Array,
        timestep: jax.Array,
        condition: Any,
        config: Any,
        adapters: Any = None,
        scale: float = 1.0,
    ) -> jax.Array:
        """The velocity dz/dsigma, noise minus clean latents.

        Args:
          params: as from `init_params`; a model of several experts chooses among them here, by the
            timestep of each sample.
          latents: noisy latents [B, T, H, W, C].
          timestep: float32 [B], 1000 * sigma.
          condition: of `make_condition`, or `unconditional`.
          config: static.
          adapters: as from `models.lora.init_adapters`, or None.
          scale: of the adapters.

        Returns:
          float32 [B, T, H, W, C].

        Raises:
          ValueError: shapes that do not fit the config, in one line.
        """
        ...

    def make_condition(self, arrays: Mapping[str, Any], config: Any, latent_frames: int) -> Any:
        """The condition of P samples: any pytree whose leaves are [P, ...].

        Args:
          arrays: of an embedding cache, numpy or JAX: `text` [P, L, D] and `text_mask` bool [P, L]
            always; where the cache has them, `byt5` and `image` with their masks, and
            `image_latents` [P, 1, h, w, C], the first frame in the units of the transformer.
          config: decides the types of the leaves.
          latent_frames: of a clip.
        """
        ...

    def unconditional(self, condition: Any, negative: Any) -> Any:
        """The other branch of guidance.

        Args:
          condition: of B samples.
          negative: of the one negative prompt, leaves [1, ...].

        Returns:
          Like `condition`, leaf by leaf: both branches go through the model in one batch.
        """
        ...

    def with_step_end(
        self, condition: Any, timestep_end: Callable[[], jax.Array], config: Any
    ) -> Any:
        """The condition of a model that is told where its step ends; the same for all others.

        Args:
          condition: of B samples.
          timestep_end: gives float32 [B], 1000 * sigma at the end of the step.
          config: decides whether the model is told.
        """
        ...

    def embedding_needs(self, config: Any) -> EmbeddingNeeds:
        """What embeddings the model takes."""
        ...


class AutoencoderConfig(Protocol):
    """A frozen, hashable dataclass: the fields of diffusers' config.json, then `dtype`."""

    dtype: str  # of matmuls and activations

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels that a latent is high and wide."""
        ...

    @property
    def temporal_compression_ratio(self) -> int:
        """t: 1 + k * t frames become 1 + k latent frames."""
        ...

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> AutoencoderConfig:
        """From the object in diffusers' config.json; ValueError: a line with field and value."""
        ...

    def to_json(self) -> str:
        """The text of diffusers' config.json."""
        ...


class VideoAutoencoder(Protocol):
    """A module whose autoencoder goes between pixels and latents.

    Its parameters are {"encoder": ..., "decoder": ...}; no function needs more than its own part.
    Latents have two units: those of the autoencoder, and those that the transformer works on.
    """

    NAME: str  # in messages
    Config: type  # an `AutoencoderConfig`
    RELEASED: Mapping[str, Any]  # config of each released variant of the transformers beside it

    def init_params(self, config: Any, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 parameters as nested dicts; works under `jax.eval_shape`."""
        ...

    def partition_names(self, config: Any) -> dict[str, Any]:
        """As of `VideoModel`."""
        ...

    def encode(self, params: Any, videos: jax.Array, config: Any) -> tuple[jax.Array, jax.Array]:
        """(mean, logvar) of the latents of clips [B, F, H, W, 3] in [-1, 1], in its own units.

        Raises:
          ValueError: clips that do not fit the compression ratios.
        """
        ...

    def decode(self, params: Any, latents: jax.Array, config: Any) -> jax.Array:
        """Clips float32 [B, F, H, W, 3], nominally in [-1, 1], of latents in its own units.

        Raises:
          ValueError: latents of another number of channels.
        """
        ...

    def decode_unclipped(self, params: Any, latents: jax.Array, config: Any) -> jax.Array:
        """`decode` before anything that clips the pixels: tiles are blended there."""
        ...

    def clip_pixels(self, videos: jax.Array) -> jax.Array:
        """What `decode` does after `decode_unclipped`: `decode` is one after the other."""
        ...

    def to_model_latents(self, latents: jax.Array, config: Any) -> jax.Array:
        """From its own units to those of the transformer."""
        ...

    def to_vae_latents(self, latents: jax.Array, config: Any) -> jax.Array:
        """The inverse of `to_model_latents`."""
        ...
