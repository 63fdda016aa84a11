"""The whole command on several devices and in several processes trains what one device trains."""

import pathlib
import signal
import subprocess

import cluster
import numpy as np
import pytest
import trainer_process

# Rounding stays rounding: steps of Adam far above its eps follow the sign of tiny gradients.
OVERRIDES = {"optimizer.eps": 1e-4, "optimizer.learning_rate": 1e-4, "eval.every": 2}


@pytest.fixture(scope="module")
def overrides(tiny_overrides):
    return {**tiny_overrides, **OVERRIDES}


@pytest.fixture(scope="module")
def one_device(overrides, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    trainer_process.finish(trainer_process.start(workdir, overrides), workdir)
    return workdir


def start_two(
    workdir: pathlib.Path, overrides: dict[str, object], *more: str
) -> list[subprocess.Popen]:
    """Starts the command in two processes with one device each, on one workdir."""
    together = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{cluster.free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        trainer_process.start(
            workdir, overrides, *more, suffix=f".{i}.log", **together, JAX_PROCESS_ID=str(i)
        )
        for i in range(2)
    ]


def finish_two(processes: list[subprocess.Popen], workdir: pathlib.Path) -> None:
    """Waits for a good end of both."""
    codes = [process.wait(timeout=300) for process in processes]
    logs = [workdir.with_suffix(f".{i}.log").read_text()[-2000:] for i in range(2)]
    assert codes == [0, 0], logs


def assert_same_run(found: pathlib.Path, wanted: pathlib.Path) -> None:
    """The same metrics and parameters, apart from the order of summation."""
    mine, theirs = trainer_process.rows(found), trainer_process.rows(wanted)
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        for name in a:
            if name.startswith(("reward/", "eval/", "grad/", "kl/", "advantage/", "step")):
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), (a["step"], name)
    for a, b in zip(
        trainer_process.saved_arrays(found), trainer_process.saved_arrays(wanted), strict=True
    ):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-3, atol=1e-4)


def test_four_devices(overrides, one_device, tmp_path):
    workdir = tmp_path / "four"
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    trainer_process.finish(trainer_process.start(workdir, overrides, *mesh, devices=4), workdir)
    assert_same_run(workdir, one_device)


def test_two_processes_stopped_and_resumed(overrides, one_device, tmp_path):
    """A signal to one process stops both after the same step; the same commands go on."""
    workdir = tmp_path / "two"
    mesh = ("--config.mesh.data=2",)
    processes = start_two(workdir, overrides, *mesh)
    trainer_process.wait_for(lambda: len(trainer_process.rows(workdir)) >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    finish_two(processes, workdir)
    assert not (workdir / "summary.json").exists()
    finish_two(start_two(workdir, overrides, *mesh), workdir)
    assert (workdir / "summary.json").exists()
    assert_same_run(workdir, one_device)
