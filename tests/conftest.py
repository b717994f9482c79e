"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ROOT = Path(__file__).parent.parent

# Tables are as wide on every terminal, and on none.
os.environ["COLUMNS"] = "110"

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _hear_signals() -> None:
    """Let programs that the tests start be stopped: they inherit deafness from this process.

    A runner may block these signals for all that it starts (a supervisor that waits for them) or
    ignore them (nohup, a shell's background job).
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    for number in _STOPPING:
        if signal.getsignal(number) == signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


_hear_signals()


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """Fail the test that leaves a stopping signal handled otherwise: later ones would be deaf."""
    before = {number: signal.getsignal(number) for number in _STOPPING}
    yield
    changed = [n for n, handler in before.items() if signal.getsignal(n) != handler]
    for number in changed:
        signal.signal(number, before[number])
    assert not changed, f"handlers of {changed} must be as before the test"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real traces and measurements: VOLTANA_DATA, or `shared/data` beside the project."""
    folder = Path(os.environ.get("VOLTANA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set VOLTANA_DATA to one with traces/ and dvfs/")
    return folder
