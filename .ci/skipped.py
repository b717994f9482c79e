"""pytest plug-in: add the names of the tests that were skipped, one a line, to a file in $SKIPPED.

`together` has those of runs on several workers, `alone` those of runs one at a time: so they are
run again.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_skipped: dict[str, None] = {}  # in their order; several workers may report one module


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a module that left as a whole: what it imports is not there."""
    if report.skipped:
        _skipped[report.nodeid] = None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that left by itself."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[report.nodeid] = None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write them, for `pytest @FILE`; a worker of pytest-xdist has told its controller."""
    if not hasattr(session.config, "workerinput"):
        name = "alone" if session.config.getoption("dist", "no") == "no" else "together"
        with Path(os.environ["SKIPPED"], name).open("a") as file:
            file.writelines(f"{name}\n" for name in _skipped)
