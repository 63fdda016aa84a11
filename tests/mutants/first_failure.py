"""A pytest plugin for `mutation.py`: writes down the first failure, and whose package was tested.

The file that MUTATION_REPORT names becomes a JSON object: `package` (folder of the package that
MUTATION_PACKAGE names) and, if something failed, `test`, `phase` (collection, setup, call or
teardown) and `error` (type of the exception).
"""

import importlib
import json
import os
import pathlib

import pytest

_report: dict[str, str] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if outcome.get_result().failed:
        error = call.excinfo.value
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        _failed(item.nodeid, call.when, type(error).__name__)


def pytest_collectreport(report):
    if report.failed:
        _failed(report.nodeid, "collection", str(report.longrepr).strip().splitlines()[-1])


def _failed(test: str, phase: str, error: str) -> None:
    if "test" not in _report:
        _report.update(test=test, phase=phase, error=error)


def pytest_sessionfinish(session):
    # Not earlier: conftest.py chooses the platform before the package imports JAX.
    package = importlib.import_module(os.environ["MUTATION_PACKAGE"])
    _report["package"] = str(pathlib.Path(package.__file__).resolve().parent)
    pathlib.Path(os.environ["MUTATION_REPORT"]).write_text(json.dumps(_report))
