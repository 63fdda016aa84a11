"""The gradient loop that all stages of pretraining share: update, average, log, checkpoint, resume.

Everything random in step n is drawn from `fold_in(stage key, n)` inside the compiled update. A
run that was interrupted therefore continues with the bits that it would have had.
"""

import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

from sage_grpo_jax.common import files
from sage_grpo_jax.pretraining.settings import StageConfig
from sage_grpo_jax.training import optimizers

Params = dict[str, Any]
Metrics = dict[str, jax.Array]  # scalars
Loss = tuple[jax.Array, Metrics]  # a scalar, and what is logged beside it
LossFn = Callable[..., Loss]  # loss_fn(params, key, step, *inputs)


class Phase(NamedTuple):
    """The loss that a stage minimises up to and including update `until`."""

    until: int
    loss_fn: LossFn


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
    distill: jax.Array
    sharpen: jax.Array


class TrainState(NamedTuple):
    """Parameters, their moving average and the optimizer's state; `step` counts updates done."""

    step: jax.Array
    params: Params
    average: Params
    optimizer: optax.OptState


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """Muon or AdamW with linear warm-up, cosine decay to zero and clipping of the global norm.

    Muon takes the kernels; everything else stays with Adam. Its updates are scaled to the size
    that Adam's have (a root mean square of `muon_scale` / 5 times the learning rate).
    """
    warmup_steps = min(stage.warmup_steps, stage.steps - 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, warmup_steps, decay_steps=stage.steps
    )
    clip = optax.clip_by_global_norm(stage.gradient_clip)

    if stage.optimizer == "adamw":
        decay = {"weight_decay": stage.weight_decay, "mask": _is_kernel_tree}
        return optax.chain(clip, optax.adamw(rate, b2=stage.beta2, **decay))

    # Decay is multiplied by the rate, which is `muon_scale` times that of the rest. Divided by it,
    # kernels decay as they do with AdamW.
    muon = optax.contrib.muon(
        lambda step: stage.muon_scale * rate(step),
        weight_decay=stage.weight_decay / stage.muon_scale,
        adam_learning_rate=rate,
        adam_b2=stage.beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=functools.partial(
            optimizers.muon_dimensions, kernels_only=True
        ),
    )
    return optax.chain(clip, muon)


def _is_kernel(path: tuple[Any, ...]) -> bool:
    return path[-1].key == "kernel"


def _is_kernel_tree(params: Params) -> Params:
    # Weight decay is for kernels; scales and biases stay where the data want them.
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), params)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 whose average is a copy of `params`, so that both may be donated."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params)
    )


def make_update(loss_fn: LossFn, stage: StageConfig) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted `update(state, stage_key, *inputs) -> (state, metrics)`; the state is donated."""
    optimizer = make_optimizer(stage)

    def update(state: TrainState, stage_key: jax.Array, *inputs: Any) -> tuple[TrainState, Metrics]:
        # Gradient and step.
        key = jax.random.fold_in(stage_key, state.step)
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), gradients = gradient_fn(state.params, key, state.step, *inputs)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

        # The average starts with a short memory, about a tenth of the steps so far, so that nothing
        # is left of the initialisation.
        step = state.step + 1
        decay = jnp.minimum(stage.ema_decay, step / (step + 9.0))
        average = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), state.average, params)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(step, params, average, optimizer_state), metrics

    return jax.jit(update, donate_argnums=0)


def run_stage(
    name: str,
    stage: StageConfig,
    init_params: Callable[[], Params],
    phases: Sequence[Phase],
    stage_key: jax.Array,
    inputs: tuple[Any, ...],
    workdir: pathlib.Path,
) -> Params:
    """Trains `stage.steps` updates, or what is left of them, and returns the averaged parameters.

    Checkpoints lie in `workdir/name/`, metrics are appended to `workdir/metrics.jsonl`, cut back
    first to the step that is restored.

    Raises:
      FloatingPointError: when a logged loss is not finite; nothing is saved after such a step.
    """
    optimizer = make_optimizer(stage)
    with _open_checkpointer(workdir / name) as checkpointer:
        # What was logged beyond the checkpoint comes again: those lines go first.
        state = _restore_or_init(checkpointer, init_params, optimizer)
        start = int(state.step)
        metrics_file = workdir / "metrics.jsonl"
        truncate_metrics(metrics_file, name, start)
        if start < stage.steps:
            say(f"{name}: updates {start} to {stage.steps}")

        # One program a phase, compiled when its first step comes.
        updates = [(phase.until, make_update(phase.loss_fn, stage)) for phase in phases]
        progress = _Progress(name, start, stage.steps, metrics_file)
        for step in range(start + 1, stage.steps + 1):
            update = next(update for until, update in updates if step <= until)
            state, metrics = update(state, stage_key, *inputs)

            # Reading a metric waits for the device: only now and then. But always before saving,
            # as `log` raises where one is not finite.
            last = step == stage.steps
            save = step % stage.checkpoint_every == 0 or last
            if step % stage.log_every == 0 or save:
                progress.log(step, {key: float(value) for key, value in metrics.items()})
            if save:
                checkpointer.save(step, state._asdict())
        return state.average


def load_average(directory: pathlib.Path) -> tuple[int, Params]:
    """The newest checkpoint's step and averaged parameters, also while another process trains.

    Raises:
      FileNotFoundError: when the directory holds no finished checkpoint.
    """
    directory = files.real_path(directory)
    # Checkpoints that are being written have other names, and take this one when complete.
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}; run that stage first")
    average = ocp.load(directory / str(max(steps)))["average"]
    # Restored arrays are bound to a device, new ones are not; mixed, they compile a program twice.
    return max(steps), jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), average)


def _open_checkpointer(directory: pathlib.Path) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(
        files.real_path(directory),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
    )


def _restore_or_init(
    checkpointer: ocp.training.Checkpointer,
    init_params: Callable[[], Params],
    optimizer: optax.GradientTransformation,
) -> TrainState:
    if checkpointer.latest is None:
        return init_state(init_params(), optimizer)
    # Shapes alone, without computing an initialisation that is thrown away.
    abstract = jax.eval_shape(lambda: init_state(init_params(), optimizer))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), abstract)
    state = checkpointer.load(checkpointer.latest.step, abstract._asdict())
    say(f"resumed from {checkpointer.directory}, step {checkpointer.latest.step}")
    # Restored buffers may share memory with the reader; the update donates its own.
    return jax.tree.map(jnp.copy, TrainState(**state))


def truncate_metrics(path: pathlib.Path, stage: str, step: int) -> None:
    """Drops lines of `stage` beyond `step`, and a last line that a kill left incomplete."""
    if not path.exists():
        return
    text = path.read_text()
    kept = []
    for line in text.split("\n"):
        # A last line that a kill cut off.
        if not line.endswith("}"):
            continue
        entry = json.loads(line)
        if entry["stage"] != stage or entry["step"] <= step:
            kept.append(line + "\n")
    # Untouched where nothing goes: another stage may be writing at this moment.
    if "".join(kept) != text:
        files.write_atomically(path, "".join(kept).encode())


class _Progress:
    """Writes one JSON line and one plain line with speed and time left for every logged step."""

    def __init__(self, name: str, start: int, total: int, metrics_file: pathlib.Path) -> None:
        self._name, self._total, self._file = name, total, metrics_file
        self._step, self._time = start, time.monotonic()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # Neither logged nor saved: a rerun starts from the last good checkpoint.
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{self._name} step {step}: {key} is {value}")

        # Seconds of a step, over those since the last line.
        now = time.monotonic()
        seconds = (now - self._time) / max(step - self._step, 1)
        self._step, self._time = step, now

        entry = {"stage": self._name, "step": step, **metrics, "time/step": seconds}
        with self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

        minutes, rest = divmod(round(seconds * (self._total - step)), 60)
        values = " ".join(f"{key} {value:.5g}" for key, value in metrics.items())
        left = f"{seconds:.3f} s/step, {minutes}:{rest:02d} left"
        say(f"{self._name} {step}/{self._total} {values}, {left}")


def say(line: str) -> None:
    """A plain line of progress, with the time of day, at once also into a file."""
    print(time.strftime("%H:%M:%S"), line, flush=True)
