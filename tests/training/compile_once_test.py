"""Every program is compiled once, in the first step; steps return plain numbers."""

import logging
import re

import jax
import learners

PROGRAMS = ("rollout", "decode", "update")


class Compilations(logging.Handler):
    """Collects the names of what JAX compiles, also what a cache on disk then provides."""

    LOGGER = "jax._src.interpreters.pxla"

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"Compiling (?:jit\()?([\w<>]+)", record.getMessage()):
            self.names.append(found.group(1))

    def __enter__(self) -> "Compilations":
        logger = logging.getLogger(self.LOGGER)
        self._propagate, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        self._log = jax.log_compiles()
        self._log.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._log.__exit__(*exc_info)
        logger = logging.getLogger(self.LOGGER)
        logger.removeHandler(self)
        logger.propagate = self._propagate

    def take(self) -> list[str]:
        """The names since the last call."""
        names, self.names = self.names, []
        return names


def test_programs_compile_once_and_none_after_the_first_step(
    make_small_config, local_scorer, one_device, tmp_path
):
    config = make_small_config({"loss.updates_per_rollout": 2})
    trainer = learners.make(config, local_scorer(), one_device, tmp_path)
    learner, state, batches = trainer.learner, trainer.state, iter(trainer.prompts)
    with Compilations() as compiled:
        state, _ = learner.step(state, next(batches))
        first = compiled.take()
        for name in PROGRAMS:
            assert first.count(name) == 1, (name, first)
        for _ in range(3):
            # Another prompt, another step number, failed samples: the same shapes.
            learner.scoring.scorer.failing = frozenset({1, 6})
            state, metrics = learner.step(state, next(batches))
            assert compiled.take() == []

        # Nothing that the loop writes waits for a device: the numbers are here already.
        assert {type(value) for value in metrics.values()} == {float}

        # The detector sees what it is there for.
        jax.jit(lambda x: x + 1)(jax.numpy.ones(3))
        assert "<lambda>" in compiled.take()
