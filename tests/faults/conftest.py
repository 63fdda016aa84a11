"""Whole runs in this process, with the tiny recipe of tests/training and programs compiled once."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from tiny_recipe import LocalScorer

from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import input_checks, loop, metrics
from sage_grpo_jax.training import programs as programs_lib
from sage_grpo_jax.training.blueprint import Blueprint

# Compiled programs, by what they depend on.
_PROGRAMS: dict[Any, Any] = {}
_build_programs = programs_lib.build


def _cached_programs(blueprint):
    """The real programs; configs that differ only in what the host looks at share them."""
    config = blueprint.config
    plain = type(config)()
    loss = dataclasses.replace(config.loss, ratio_tolerance=0.0, rollout_tolerance=0.0)
    key = dataclasses.replace(
        config,
        num_steps=1,
        rewards=plain.rewards,
        checkpoint=plain.checkpoint,
        data=plain.data,
        loss=loss,
        eval=dataclasses.replace(config.eval, every=0),
    )
    if key not in _PROGRAMS:
        _PROGRAMS[key] = _build_programs(blueprint)
    return dataclasses.replace(_PROGRAMS[key], blueprint=blueprint)


@dataclasses.dataclass
class Result:
    """What a run left in its workdir."""

    rows: list[dict[str, Any]]
    arrays: list[np.ndarray]  # of the state at the end: parameters, optimizer, trust region, step


class Runs:
    """Trains in this process; the scorer is a local one unless `service` is set."""

    def __init__(self, make_config) -> None:
        self.make_config = make_config  # a test may put another in its place
        self.scorer: Any = LocalScorer()
        self.state: Any = None  # of the run that ended last

    def config(self, **overrides: Any):
        """The tiny recipe: 3 steps, one checkpoint at the end unless something goes wrong."""
        base = {
            "num_steps": 3,
            "checkpoint.every": 3,
            "eval.every": 2,
            "eval.num_prompts": 2,
            "rollout.prompts_per_step": 1,
            "rollout.group_size": 4,
            "rollout.decode_batch": 2,
            "loss.micro_batch": 2,
        }
        dotted = {name.replace("__", "."): value for name, value in overrides.items()}
        return self.make_config({**base, **dotted})

    def train(self, workdir: pathlib.Path, **overrides: Any) -> dict[str, Any] | None:
        """`loop.train`."""
        return loop.train(self.config(**overrides), workdir)

    def result(self, workdir: pathlib.Path) -> Result:
        """Rows without the seconds, and the state of the run that ended last."""
        rows = [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in metrics.read_metrics(workdir / metrics.METRICS_FILE)
        ]
        return Result(rows, [np.asarray(x) for x in jax.tree.leaves(self.state)])

    def assert_same(self, workdir: pathlib.Path, expected: Result) -> None:
        """Bit for bit."""
        found = self.result(workdir)
        assert found.rows == expected.rows
        for a, b in zip(found.arrays, expected.arrays, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def runs(make_small_config, monkeypatch) -> Runs:
    """Whole runs on one device; without the DiT, which has no part in this."""
    made = Runs(make_small_config)
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    monkeypatch.setattr(input_checks, "make_mesh", lambda config: mesh)
    monkeypatch.setattr(programs_lib, "build", _cached_programs)

    @contextlib.contextmanager
    def open_scorer(config, workdir):
        yield made.scorer

    close = loop._Run.close

    def close_and_keep(run):
        made.state = run.state
        close(run)

    monkeypatch.setattr(loop._Run, "close", close_and_keep)
    made.open_scorer = loop.open_scorer  # the real one
    monkeypatch.setattr(loop, "open_scorer", open_scorer)
    return made


_STRAIGHT: dict[str, Result] = {}  # by the folder of the network


@pytest.fixture
def straight(runs, tmp_path_factory) -> Result:
    """What a run leaves that nobody disturbs; made once."""
    network = runs.config().model.transformer
    if network not in _STRAIGHT:
        workdir = tmp_path_factory.mktemp("straight")
        runs.train(workdir)
        _STRAIGHT[network] = runs.result(workdir)
    return _STRAIGHT[network]


@pytest.fixture
def refused(runs, make_config, tmp_path, monkeypatch):
    """refused(overrides) -> the message of a run that ends before anything expensive."""
    runs.make_config = make_config  # the DiT's own limits count, and nothing is compiled

    def never(*args, **kwargs):
        raise AssertionError("something expensive was done before the input was checked")

    for name in ("load_vae", "load_transformer", "fresh_state"):
        monkeypatch.setattr(Blueprint, name, never)
    monkeypatch.setattr(programs_lib, "build", never)
    monkeypatch.setattr(loop, "open_scorer", never)

    def attempt(overrides):
        with pytest.raises(ValueError, match=r"^config\.") as error:
            runs.train(tmp_path / "run", **overrides)
        assert "\n" not in str(error.value)
        return str(error.value)

    return attempt
