"""The real engine, started once for all tests that need it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from voltana.hwreplay.engines.launch import run_fleet
from voltana.hwreplay.engines.plan import Installation
from voltana.hwreplay.engines.server import Server

ENGINE = ROOT / ".engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFleet:
    """One prefill and two decode servers, in this order, with metrics and batch notices."""

    servers: list[Server]
    """A server that is started again takes its place."""
    sockets: Path
    logs: Path

    @property
    def prefill(self) -> Server:
        return self.servers[0]

    @property
    def decode(self) -> list[Server]:
        return self.servers[1:]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the engine come last and together: its servers run for them alone."""
    items.sort(key=lambda item: "engine_fleet" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def engine_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineFleet]:
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    sockets = Path(tempfile.mkdtemp(prefix="voltana-"))  # a socket's path must be short
    logs = tmp_path_factory.mktemp("engine")
    try:
        with run_fleet(
            Installation.in_folder(ENGINE),
            logs,
            {"prefill": 1, "decode": 2},
            sockets=sockets,
            start_s=400,
        ) as servers:
            yield EngineFleet(servers=servers, sockets=sockets, logs=logs)
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
