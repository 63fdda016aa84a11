"""What a run is built from: recipe, networks and mesh, and what follows from the three, once."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sage_grpo_jax import weights
from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import schema
from sage_grpo_jax.flow import noise
from sage_grpo_jax.models import lora, registry
from sage_grpo_jax.parallel import sharding
from sage_grpo_jax.policy import networks as networks_lib
from sage_grpo_jax.policy import starting_adapters
from sage_grpo_jax.training import checkpoint as checkpoint_lib
from sage_grpo_jax.training import optimizers
from sage_grpo_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Recipe, networks and mesh of a run. What follows from them is worked out when first asked.

    Nothing here holds an array: `state` and `base` are shapes with shardings, and what `load_...`
    and `fresh_state` return belongs to the caller.
    """

    config: schema.Config
    networks: networks_lib.Networks
    mesh: jax.sharding.Mesh

    @classmethod
    def read(cls, config: schema.Config, mesh: jax.sharding.Mesh) -> "Blueprint":
        """With the networks whose weights the recipe names; see `networks.read_networks`."""
        return cls(config, networks_lib.read_networks(config.model), mesh)

    @classmethod
    def describe(cls, config: schema.Config, mesh: jax.sharding.Mesh) -> "Blueprint":
        """The same where weights need not be there; see `networks.describe_networks`."""
        return cls(config, networks_lib.describe_networks(config.model), mesh)

    # --- Constants -------------------------------------------------------------------------------

    @functools.cached_property
    def plan(self) -> plan_lib.Plan:
        """Schedule, trained steps and their weights.

        Raises:
          ValueError: see `config.plan.make_plan`.
        """
        return plan_lib.make_plan(self.config, self.networks.transformer, self.networks.vae)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Clip, AdamW or Muon, trust region."""
        return optimizers.make_optimizer(self.config)

    @functools.cached_property
    def state(self) -> state_lib.LearnerState:
        """The learner's state as shapes with shardings; with LoRA its parameters are adapters."""
        # What is trained decides the shape of everything else: optimizer, trust region and averages
        # are trees like it. With LoRA that is the adapters alone, and so are the checkpoints.
        network, adapters = self.networks.transformer, self.config.lora.adapters
        shapes, model = self.shapes, registry.of(network)
        if adapters is None:
            names = model.partition_names(network)
        else:
            shapes = lora.abstract_adapters(shapes, adapters, model)
            names = lora.partition_names(adapters, model)

        averages = self.config.averages
        return state_lib.abstract_state(self.optimizer, shapes, names, self.mesh, averages)

    @functools.cached_property
    def base(self) -> Any:
        """The frozen weights under the adapters as shapes with shardings; None without adapters."""
        if self.config.lora.adapters is None:
            return None
        return self._abstract_transformer(self._base_dtype)

    @functools.cached_property
    def shapes(self) -> Any:
        """The transformer's parameters as shapes."""
        return networks_lib.abstract_params(self.networks.transformer)

    @property
    def _base_dtype(self) -> jnp.dtype:
        wanted = self.config.lora.base_dtype
        return jnp.dtype(self.networks.transformer.dtype if wanted == "auto" else wanted)

    def _abstract_transformer(self, dtype: Any) -> Any:
        """The transformer's parameters as shapes with shardings."""
        network = self.networks.transformer
        names = registry.of(network).partition_names(network)
        shardings = sharding.parameter_shardings(self.mesh, names, self.shapes)
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, dtype, sharding=place),
            self.shapes,
            shardings,
        )

    # --- Arrays ----------------------------------------------------------------------------------

    def load_vae(self) -> Any:
        """The VAE's parameters in its compute dtype, on every device."""
        network, path = self.networks.vae, self.networks.vae_path
        place = jax.tree.map(
            lambda _: sharding.replicated(self.mesh), networks_lib.abstract_params(network)
        )
        return weights.load(path, network, place, dtype=jnp.dtype(network.dtype))

    def load_transformer(self, dtype: Any = jnp.float32) -> Any:
        """The transformer's parameters, sharded."""
        shardings = state_lib.shardings_of(self._abstract_transformer(dtype))
        network, path = self.networks.transformer, self.networks.transformer_path
        return weights.load(path, network, shardings, dtype=dtype)

    def load_base(self) -> Any:
        """The frozen weights under the adapters; None without adapters."""
        return None if self.base is None else self.load_transformer(self._base_dtype)

    def fresh_state(self) -> state_lib.LearnerState:
        """The state at step 0: loaded weights or adapters, empty optimizer, trust region."""
        tx, averages, settings = self.optimizer, self.config.averages, self.config.lora
        # One jitted program with these shardings makes the state: moments and copies appear where
        # they belong, and no device holds all of a large model first.
        shardings = state_lib.shardings_of(self.state)

        if settings.adapters is None:
            init = jax.jit(
                lambda params: state_lib.init_state(tx, params, averages), out_shardings=shardings
            )
            return init(self.load_transformer())

        network = self.networks.transformer
        shapes, model = self.shapes, registry.of(network)
        # Adapters to start from may have fewer layers and a lower rank than the trained ones; what
        # they lack is drawn as in a run without them.
        given, ratio = starting_adapters.load(settings, network, self.mesh)

        def init_adapters(key: jax.Array, given: Any) -> state_lib.LearnerState:
            fresh = lora.init_adapters(shapes, settings.adapters, key, model)
            return state_lib.init_state(tx, lora.start_from(fresh, given, ratio), averages)

        key = noise.adapter_key(self.config.seed)
        return jax.jit(init_adapters, out_shardings=shardings)(key, given)

    def load_policy(
        self, checkpoint: str | pathlib.Path | None = None, ema: bool = False
    ) -> tuple[Any, Any]:
        """The policy of a run, or of a recipe that has not started.

        Args:
          checkpoint: workdir of a run, for its newest checkpoint; None: the recipe's own weights.
          ema: whether the moving average of the run is wanted; not read without a checkpoint.

        Returns:
          (weights, adapters): what the model's `velocity` takes; no adapters: None.

        Raises:
          FileNotFoundError: no complete checkpoint there.
          ValueError: a damaged one, or a run without a moving average.
        """
        base = self.load_base()
        if checkpoint is None:
            return (self.load_transformer() if base is None else base), None

        trained = checkpoint_lib.restore_params(checkpoint, self.state.params, ema=ema)
        return (trained, None) if base is None else (base, trained)
