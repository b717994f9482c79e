"""Two controllers on the real SGLang over emulated cards: clocks are obeyed, and given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hwreplay.conftest import ENGINE

TOP_MHZ = "1410"
POLICIES = ("static-max", "pid", "ecomin + consolidate")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each policy's cell of the short loop, by name."""
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    out = tmp_path_factory.mktemp("loop") / "out"
    command = [
        sys.executable,
        "-m",
        "voltana.experiments.hardware.loop",
        "--short",
        "--out",
        str(out),
    ]
    options = ["--dilation", "3", "--engine", str(ENGINE), "--only", *POLICIES]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    # 1 is a verdict on latencies, which a busy machine may well miss; here they are not judged
    assert done.returncode in (0, 1), done.stderr[-2000:]
    found = json.loads((Path(out) / "cells.json").read_text())["cells"]
    return {cell["policy"]: cell for cell in found}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_controller_is_obeyed_and_saves_energy(
    cells: dict[str, dict[str, Any]], policy: str
) -> None:
    cell = cells[policy]
    below = {
        phase: sum(share for clock, share in shares.items() if clock != TOP_MHZ)
        for phase, shares in cell["residency"]["observed"].items()
    }
    assert below["decode"] > 0.1
    assert cell["energy_j"][1] < cells["static-max"]["energy_j"][1]
    for counts in cell["agents"].values():
        assert counts["decisions"] > 0
        assert counts.get("refused", 0) == counts.get("safe_states", 0) == 0


@pytest.mark.engine
@pytest.mark.slow
def test_ecomin_finds_the_cards_as_its_profile_says(cells: dict[str, dict[str, Any]]) -> None:
    """The cards run from the very tables that its predictor was fitted to.

    In simulation it ends at 0.98 and 1.03. Passes that are late on a busy machine pull the
    regression by up to a tenth; a predictor that were a fifth too fast or slow would still show.
    """
    learnt = cells["ecomin + consolidate"]["learnt"]["decode-0"]
    assert learnt["correction"] == pytest.approx(1.0, abs=0.15)
    assert 0.95 < learnt["error_quantile"] < 1.3


@pytest.mark.engine
@pytest.mark.slow
def test_clocks_are_given_back(cells: dict[str, dict[str, Any]]) -> None:
    """Every lock of every cell, by the cards' own count, and none is left."""
    for cell in cells.values():
        for card in cell["cards"]:
            assert card["num_locks"] > 0
            assert card["locked_mhz"] == card["wanted_mhz"] == 0
