"""Fixture `standin`: an emulated card behind the real pynvml, one a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.profiles.device.standin import Standin
from voltana.hwreplay.emulated.build import build_library


@pytest.fixture(scope="session")
def library_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is needed to compile the emulated card")
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def standin(library_dir: Path, tmp_path: Path) -> Standin:
    return Standin(library_dir, tmp_path / "cards")
