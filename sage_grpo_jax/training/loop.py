"""The training loop: set up, resume, step, evaluate, save, summarise."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from sage_grpo_jax.parallel import hosts
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.rewards import client as client_lib
from sage_grpo_jax.rewards import supervisor
from sage_grpo_jax.training import checkpoint, evaluation, metrics, setup
from sage_grpo_jax.training import config as config_lib
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import recipe as recipe_lib

# Fields that a rerun may change without becoming another run.
OPERATIONAL = (
    "num_steps",
    "mesh",
    "checkpoint",
    "rewards.spawn",
    "rewards.address",
    "rewards.timeout_seconds",
    "rewards.budget_seconds",
    "rewards.max_in_flight",
)


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the state after the last complete step is to be saved."""


class TooManySkipsError(RuntimeError):
    """Several updates in a row were not applied; the run was saved and stopped."""


class Interrupt:
    """Turns SIGTERM and SIGINT into a flag that is looked at between phases."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._previous = {
            s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice from the keyboard: now
        self.requested = True
        logging.warning("signal %d: saving and stopping", number)

    def check_alone(self) -> None:
        """Raises in the middle of a step; only where no other process would wait in vain."""
        if self.requested and jax.process_count() == 1:
            raise Interrupted

    def check_together(self) -> None:
        """Raises on all processes when any of them was asked to stop."""
        if hosts.agree(self.requested):
            raise Interrupted


def train(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Trains until `config.num_steps`, going on from the newest checkpoint in `workdir`.

    Args:
      config: validated.
      workdir: identity of the run; the same command with the same folder resumes.

    Returns:
      The summary that is also in `summary.json`; None when a signal stopped the run.

    Raises:
      ValueError: bad input, before any expensive work.
      TooManySkipsError, learner.NumericsError: see there; the last good state is saved.
    """
    networks = setup.read_networks(config.model)
    recipe_lib.make_recipe(config, networks.transformer, networks.vae)  # fails early
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh))
    recipe_lib.check_mesh(config, mesh)
    claim_workdir(config, workdir)
    if (summary := _finished(config, workdir)) is not None:
        return summary
    _describe_policy(config, networks, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        scorer = stack.enter_context(open_scorer(config, workdir))
        # Before this a signal ends the process at once: there is nothing to save.
        interrupt = stack.enter_context(Interrupt())
        run = _Run(config, workdir, networks, mesh, scorer, interrupt)
        stack.callback(run.close)
        return run.train()


def claim_workdir(config: config_lib.Config, workdir: pathlib.Path) -> None:
    """Writes config.json, or checks that the one that is there belongs to the same run.

    Raises:
      ValueError: naming the fields that differ.
    """
    path = workdir / "config.json"
    mine = _flatten(dataclasses.asdict(config))
    if path.exists():
        theirs = _flatten(json.loads(path.read_text()))
        differing = [
            f"{name} ({theirs.get(name)!r} there, {mine.get(name)!r} here)"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
            and not any(name == o or name.startswith(f"{o}.") for o in OPERATIONAL)
        ]
        if differing:
            raise ValueError(
                f"--workdir: {workdir} belongs to a run with another config: "
                f"{'; '.join(differing)}. Allowed: the same config, or another folder"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        metrics.write_json(path, dataclasses.asdict(config))


def _finished(config: config_lib.Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    return summary if summary["steps"] >= config.num_steps else None


def _describe_policy(config: config_lib.Config, networks, workdir: pathlib.Path) -> None:
    """Writes transformer.json, and lora.json with adapters: all that `convert` needs to know."""
    if jax.process_index():
        return
    text = networks.transformer.to_json()
    metrics.write_atomically(workdir / "transformer.json", text.encode())
    if (adapters := config.lora.adapters) is not None:
        base = config.model.transformer
        if not base.startswith(setup.ASSET):
            base = str(networks.transformer_path.absolute())
        metrics.write_json(workdir / "lora.json", {**dataclasses.asdict(adapters), "base": base})


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@contextlib.contextmanager
def open_scorer(
    config: config_lib.Config, workdir: pathlib.Path
) -> Iterator[client_lib.RewardClient]:
    """A client of the reward service; starts the service when `rewards.spawn`."""
    rewards = config.rewards
    with contextlib.ExitStack() as stack:
        address = rewards.address
        if rewards.spawn:
            log = workdir / f"rewards-{jax.process_index()}.log"
            server = stack.enter_context(supervisor.KeptServer(rewards.backend, log))
            address = server.address
        client = client_lib.RewardClient(
            address,
            timeout=rewards.timeout_seconds,
            budget=rewards.budget_seconds,
            max_in_flight=rewards.max_in_flight,
        )
        stack.callback(client.close)
        info = client.info()
        wanted = dataclasses.asdict(rewards.weights)
        if missing := set(wanted) - set(info.names):
            raise ValueError(
                f"config.rewards.weights: {address} does not score {', '.join(sorted(missing))}; "
                f"allowed: {', '.join(info.names)}"
            )
        logging.info("rewards from %s, fingerprint %s", address, info.fingerprint[:16])
        yield client


class _Run:
    """The parts of a run that the loop uses at every step."""

    def __init__(self, config, workdir, networks, mesh, scorer, interrupt) -> None:
        self.config, self.workdir = config, workdir
        self.interrupt = interrupt
        self.fingerprint = scorer.fingerprint
        self.prompts = setup.open_prompts(config, workdir, networks)
        self.checkpoints = checkpoint.Checkpoints(
            workdir, config.checkpoint.every, config.checkpoint.keep
        )
        self.learner = learner_lib.Learner(
            setup.build_programs(networks, config, mesh),
            setup.load_vae(networks, mesh),
            self.prompts.negative,
            scorer,
            mesh,
            interrupt.check_alone,
            setup.load_base(networks, config, mesh),
        )
        self.skipped = 0
        last_step = self.checkpoints.latest_step
        if last_step is None:
            self.state = setup.fresh_state(networks, config, mesh)
        else:
            self._restore(setup.make_abstract_state(networks, config, mesh))
        self.first_step = int(self.state.step)
        is_main = jax.process_index() == 0
        self.writer = metrics.MetricsWriter(workdir, last_step) if is_main else None
        self.progress = metrics.Progress(config.num_steps, self.first_step) if is_main else None

    def _restore(self, abstract_state: Any) -> None:
        self.state, record = self.checkpoints.restore(abstract_state, self.prompts.train)
        self.skipped = record["skipped"]
        if record["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"config.rewards: the reward model has changed (fingerprint "
                f"{self.fingerprint[:16]}, the run was started with "
                f"{record['fingerprint'][:16]}). Allowed: the same model, or a new workdir"
            )
        if record["prompts"] != self.prompts.fingerprint:
            raise ValueError(
                f"config.data.train_prompts: {self.config.data.train_prompts} holds other prompts "
                "or embeddings than when the run was started. Allowed: the same, or a new workdir"
            )
        logging.info("going on from step %d", int(self.state.step))

    def train(self) -> dict[str, Any] | None:
        """The loop; see `train` above."""
        try:
            self._loop()
        except (Interrupted, learner_lib.NumericsError, learner_lib.RewardModelChangedError):
            # self.state is the state after the last complete step: nothing of it is lost.
            self._save()
            self.checkpoints.wait()
            if not self.interrupt.requested:
                raise
            self._note(f"stopped at step {int(self.state.step)}; the same command goes on")
            return None
        self._save()
        self.checkpoints.wait()
        return self._summarise()

    def _loop(self) -> None:
        if self.first_step == 0 and self.checkpoints.latest_step is None:
            self._write(0, self._evaluate(0))
        batches = iter(self.prompts)
        for step in range(self.first_step + 1, self.config.num_steps + 1):
            self.interrupt.check_together()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = self.learner.step(self.state, next(batches))
            self.state = state
            values |= self._evaluate(step) if self._evaluation_due(step) else {}
            self._write(step, values)
            self._count_skips(values)
            if self.checkpoints.due(step):
                self._save()

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.config.num_steps or (every > 0 and step % every == 0)

    def _evaluate(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        result = evaluation.evaluate(self.learner, self.state.params, self.prompts.evaluation)
        if self.writer is not None:
            gif = evaluation.save_samples(result, self.workdir, f"step_{step:06d}", self.config)
            frames = result.videos.shape[2:4]
            self.writer.write_animation(step, "eval/videos", gif, *frames)
            self._note(
                f"evaluation at step {step}: overall {result.metrics['eval/reward/overall']:+.3f}"
            )
        return {**result.metrics, "time/eval": time.perf_counter() - started}

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.writer is None:
            return
        self.writer.write(step, values)
        if step > 0:
            self.progress.step(step, values)

    def _note(self, text: str) -> None:
        if self.progress is not None:
            self.progress.note(text)

    def _count_skips(self, values: dict[str, float]) -> None:
        self.skipped = 0 if values["update/applied"] else self.skipped + 1
        limit = self.config.rewards.max_skipped_updates
        if self.skipped >= limit:
            self._save()
            self.checkpoints.wait()
            raise TooManySkipsError(
                f"{self.skipped} updates in a row were skipped (config.rewards."
                f"max_skipped_updates = {limit}): too few rewards, or loss, gradient or "
                f"parameters not finite; see the warnings above. Saved at step "
                f"{int(self.state.step)}"
            )

    def _save(self) -> None:
        if (step := int(self.state.step)) == 0:
            return
        record = {
            "skipped": self.skipped,
            "fingerprint": self.fingerprint,
            "prompts": self.prompts.fingerprint,
        }
        self.checkpoints.save(step, self.state, self.prompts.train, record)

    def _summarise(self) -> dict[str, Any] | None:
        if self.writer is None:
            return None
        summary = summarise(metrics.read_metrics(self.workdir / metrics.METRICS_FILE), self.config)
        metrics.write_json(self.workdir / "summary.json", summary)
        return summary

    def close(self) -> None:
        """Closes files and waits for the checkpoints."""
        self.checkpoints.close()
        if self.writer is not None:
            self.writer.close()


def summarise(rows: list[dict[str, Any]], config: config_lib.Config) -> dict[str, Any]:
    """First and last evaluation, seconds by phase, from the rows of metrics.jsonl."""
    evaluations = [
        {name: value for name, value in row.items() if name.startswith("eval/")} for row in rows
    ]
    evaluations = [e for e in evaluations if e]
    seconds: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("time/"):
                seconds[name] = seconds.get(name, 0.0) + value
    return {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        "steps": rows[-1]["step"],
        "eval": {"first": evaluations[0], "last": evaluations[-1]},
        "time": seconds,
    }
