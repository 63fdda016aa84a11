"""The training loop: set up, resume, step, evaluate, save, summarise."""

import contextlib
import copy
import math
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from sage_grpo_jax.config import plan as plan_lib
from sage_grpo_jax.config import schema
from sage_grpo_jax.parallel import hosts
from sage_grpo_jax.policy import conditions
from sage_grpo_jax.policy import prompts as prompts_lib
from sage_grpo_jax.rewards import client as client_lib
from sage_grpo_jax.training import checkpoint, evaluation, input_checks, metrics
from sage_grpo_jax.training import learner as learner_lib
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training import workdir as workdir_lib
from sage_grpo_jax.training.blueprint import Blueprint
from sage_grpo_jax.training.reward_service import open_scorer
from sage_grpo_jax.training.scoring import RewardModelChangedError

StorageError = checkpoint.StorageError


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the state after the last complete step is to be saved."""


class TooManySkipsError(RuntimeError):
    """Several updates in a row were not applied; the run was saved and stopped."""


class Interrupt:
    """Turns SIGTERM, SIGINT and SIGHUP into a flag that is looked at between phases."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        wanted = [signal.SIGTERM, signal.SIGINT]
        # A terminal that is closed; under nohup it is ignored, and stays so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        self._previous = {s: signal.signal(s, self._request) for s in wanted}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        # Nothing is raised the first time: an exception in the middle of a save or a collective
        # would leave half of it behind.
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice from the keyboard: now
        self.requested = True
        logging.warning("signal %d: saving and stopping", number)

    def check_alone(self) -> None:
        """Raises in the middle of a step; only where no other process would wait in vain."""
        # In a cluster the others may be in the middle of a program that needs this process.
        if self.requested and jax.process_count() == 1:
            raise Interrupted

    def check_together(self) -> None:
        """Raises on all processes when any of them was asked to stop."""
        if hosts.agree(self.requested):
            self.requested = True  # here too, where it was another process that was asked
            raise Interrupted


def train(
    config: schema.Config,
    workdir: pathlib.Path,
    make_shadow: Callable[[plan_lib.Plan], learner_lib.Check] | None = None,
) -> dict[str, Any] | None:
    """Trains until `config.num_steps`, going on from the newest checkpoint in `workdir`.

    Args:
      config: validated.
      workdir: identity of the run; the same command with the same folder resumes.
      make_shadow: makes the check of `config.debug.shadow`, as `checks.shadow.Shadow` does.

    Returns:
      The summary that is also in `summary.json`; None when a signal stopped the run.

    Raises:
      ValueError: bad input, before any expensive work (weights that are not finite: once loaded).
      TooManySkipsError, scoring.RewardModelChangedError: see there; the last good state is saved.
      ratio.NumericsError: see there; nothing was applied since the last checkpoint's rerun.
      StorageError: a full or broken disk; the last complete checkpoint is untouched.
      RewardServiceError: the reward service did not come up.
    """
    if not config.debug.shadow:
        make_shadow = None
    elif make_shadow is None:
        raise ValueError("config.debug.shadow: got True without a shadow; allowed: False")

    # What is wrong is told in the order of what it costs to find out: the recipe, the folder, the
    # prompts, the reward service, and only then the weights.
    blueprint = input_checks.check(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lib.locked(workdir))
        # The lock comes first: nothing in the folder may change while it is looked at.
        workdir_lib.claim(config, workdir)
        if (summary := workdir_lib.finished(config, workdir)) is not None:
            return summary

        workdir_lib.describe_policy(config, blueprint.networks, workdir)
        workdir_lib.remove_leftovers(workdir)

        stack.enter_context(jax.set_mesh(blueprint.mesh))
        prompts = input_checks.open_prompts(config, workdir, blueprint.networks)
        workdir_lib.claim_encoder(config, prompts.encoder, workdir)
        scorer = stack.enter_context(open_scorer(config, workdir))
        # Before this a signal ends the process at once: there is nothing to save.
        interrupt = stack.enter_context(Interrupt())
        run = _Run(blueprint, workdir, scorer, interrupt, prompts, make_shadow)
        stack.callback(run.close)
        return run.train()


class _Run:
    """The parts of a run that the loop uses at every step."""

    def __init__(
        self,
        blueprint: Blueprint,
        workdir: pathlib.Path,
        scorer: client_lib.RewardClient,
        interrupt: Interrupt,
        prompts: prompts_lib.Prompts,
        make_shadow: Callable[[plan_lib.Plan], learner_lib.Check] | None,
    ) -> None:
        config = blueprint.config
        self.config, self.workdir = config, workdir
        self.interrupt = interrupt
        self.fingerprint = scorer.fingerprint
        self.prompts = prompts
        self.checkpoints = checkpoint.Checkpoints(
            workdir, config.checkpoint.every, config.checkpoint.keep
        )

        # What is frozen, and the programs
        with input_checks.loading("vae"):
            vae_params = blueprint.load_vae()
            input_checks.require_finite(vae_params)
        with input_checks.loading("transformer"):
            base = blueprint.load_base()
            input_checks.require_finite(base)
        programs = programs_lib.build(blueprint)

        self.learner = learner_lib.Learner(
            programs,
            vae_params,
            self.prompts.negative,
            scorer,
            interrupt.check_alone,
            base,
            make_shadow and make_shadow(programs.plan),
        )

        # Where the run stands
        self.skipped = 0
        # The metrics of the newest step, while its row is not written: an evaluation was cut off.
        self.unwritten: dict[str, float] | None = None
        # What one process sees, all have: a shared file system may show it later to some.
        self.is_new = not hosts.agree(self.checkpoints.latest_step is not None)
        if self.is_new:
            with input_checks.loading("transformer"):
                self.state = blueprint.fresh_state()
                input_checks.require_finite(self.state.params)
        else:
            self._restore(blueprint.state)

        # The place in the prompts after the last complete step: the batch of a step that is given
        # up is drawn again. It is a copy, since the iterator goes on.
        self.first_step = int(self.state.step)
        self.position = copy.deepcopy(self.prompts.train.get_state())

        # What is written. Rows after the state are cut off, and the newest row too where it is to
        # be written again; a new run (0 - 1) keeps none.
        is_main = jax.process_index() == 0
        last_row = self.first_step - (self.is_new or self.unwritten is not None)
        self.writer = metrics.MetricsWriter(workdir, last_row) if is_main else None
        self.progress = metrics.Progress(config.num_steps, self.first_step) if is_main else None

    def _restore(self, abstract_state: Any) -> None:
        self.state, record = self.checkpoints.restore(abstract_state, self.prompts.train)
        self.skipped, self.unwritten = record["skipped"], record.get("unwritten")
        # A run on two reward models, or on two sets of prompts, would look like one and be none.
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
            self._save()
            self.checkpoints.wait()
            # This comes last: a summary says that nothing is left to do.
            return self._summarise()
        except (Interrupted, RewardModelChangedError):
            # self.state is the state after the last complete step: nothing of it is lost. The
            # prompts of the step that was abandoned are drawn again.
            self.prompts.train.set_state(self.position)
            self._save()
            self.checkpoints.wait()
            if not self.interrupt.requested:
                raise
            self._note(f"stopped at step {int(self.state.step)}; the same command goes on")
            return None
        except OSError as error:
            raise self.checkpoints.storage_error("a file", error) from error

    def _loop(self) -> None:
        if self.is_new:
            self._write(0, self._evaluate(0))
        if self.unwritten is not None:
            # The run before was stopped in an evaluation: it is made now, with the state of its
            # step.
            self._finish(self.first_step, self.unwritten)

        batches = iter(self.prompts)
        for step in range(self.first_step + 1, self.config.num_steps + 1):
            # All processes ask at the same place, so that they stop after the same step.
            self.interrupt.check_together()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = self.learner.step(self.state, next(batches))
            # From here on the step is complete: what follows may be cut off, and the run that goes
            # on evaluates and writes its row from the saved values.
            self.state, self.unwritten = state, values
            self.position = copy.deepcopy(self.prompts.train.get_state())
            self._finish(step, values)

    def _finish(self, step: int, values: dict[str, float]) -> None:
        """Evaluates when it is time, writes the row of a step, saves when it is time."""
        # Not |=: where the evaluation is cut off, `values` is what is saved.
        row = {**values, **(self._evaluate(step) if self._evaluation_due(step) else {})}
        self._write(step, row)
        self.unwritten = None
        self._count_skips(values)
        if self.checkpoints.due(step):
            self._save()

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.config.num_steps or (every > 0 and step % every == 0)

    def _evaluate(self, step: int) -> dict[str, float]:
        """The evaluation prompts; before the first and after the last step the test prompts too."""
        started = time.perf_counter()
        found = self._evaluate_split(step, "eval", self.prompts.evaluation)
        # Test prompts are what is reported, so nothing is chosen by them: they are looked at before
        # the first step and after the last one.
        if self.prompts.test is not None and step in (0, self.config.num_steps):
            found |= self._evaluate_split(step, "test", self.prompts.test)
        return {**found, "time/eval": time.perf_counter() - started}

    def _evaluate_split(
        self, step: int, split: str, prompts: conditions.PromptBatch
    ) -> dict[str, float]:
        params = self.state.ema if self.config.eval.weights == "ema" else self.state.params
        result = evaluation.evaluate(self.learner, params, prompts, split)
        if self.writer is not None:
            name = f"{'' if split == 'eval' else 'test_'}step_{step:06d}"
            gif = evaluation.save_samples(result, self.workdir, name, self.config)
            frames = result.videos.shape[2:4]
            self.writer.write_animation(step, f"{split}/videos", gif, *frames)
            overall = result.metrics[f"{split}/reward/overall"]
            self._note(f"{split} at step {step}: overall {overall:+.3f}")
        return result.metrics

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
                f"max_skipped_updates = {limit}); the last one because {skip_reason(values)}. See "
                f"the warnings above. Saved at step {int(self.state.step)}; the same command "
                "goes on from there"
            )

    def _save(self) -> None:
        # The state at step 0 follows from the recipe: there is nothing to keep.
        if (step := int(self.state.step)) == 0:
            return
        record = {
            "skipped": self.skipped,
            "fingerprint": self.fingerprint,
            "prompts": self.prompts.fingerprint,
            "unwritten": self.unwritten,
        }
        self.checkpoints.save(step, self.state, self.prompts.train, record)

    def _summarise(self) -> dict[str, Any] | None:
        if self.writer is None:
            return None
        summary = summarise(metrics.read_metrics(self.workdir / metrics.METRICS_FILE), self.config)
        metrics.write_json(self.workdir / workdir_lib.SUMMARY_FILE, summary)
        return summary

    def close(self) -> None:
        """Closes files and waits for the checkpoints."""
        self.checkpoints.close()
        if self.writer is not None:
            self.writer.close()


def skip_reason(values: dict[str, float]) -> str:
    """Why the update of a step was not applied, from its metrics."""
    # Parts before their sums: the first one that is broken is the cause.
    order = ("loss/policy", "kl/anchor", "kl/previous", "kl/total", "loss/total", "grad/norm")
    broken = [name for name in order if not math.isfinite(values.get(name, 0.0))]
    if broken:
        return f"{broken[0]} was not finite"
    if "loss/total" in values:
        return "the new parameters were not finite"
    return f"only {100 * values['reward/valid_fraction']:.0f} % of the samples had a reward"


def summarise(rows: list[dict[str, Any]], config: schema.Config) -> dict[str, Any]:
    """First and last evaluation, seconds by phase, from the rows of metrics.jsonl."""
    seconds: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("time/"):
                seconds[name] = seconds.get(name, 0.0) + value
    return {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        "steps": rows[-1]["step"] if rows else 0,
        "eval": _first_and_last(rows, "eval"),
        "test": _first_and_last(rows, "test"),
        "time": seconds,
    }


def _first_and_last(rows: list[dict[str, Any]], split: str) -> dict[str, dict[str, float]]:
    """The first and the last evaluation of a split; both empty where there is none."""
    found = [
        {name: value for name, value in row.items() if name.startswith(f"{split}/")} for row in rows
    ]
    found = [values for values in found if values] or [{}]
    return {"first": found[0], "last": found[-1]}
