"""pytest plug-in: write the names of the tests that were skipped, one a line, to $SKIPPED."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_skipped: list[str] = []


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a module that left as a whole: what it imports is not there."""
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that left by itself."""
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


def pytest_sessionfinish() -> None:
    """Write them, for `pytest @FILE`."""
    Path(os.environ["SKIPPED"]).write_text("".join(f"{name}\n" for name in _skipped))
