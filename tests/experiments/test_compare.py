"""Fair comparison: what counts as the best static pair and as a saving."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.compare import compare
from profiles.errors import VoltanaError


def row(
    policy: str, energy_j: float, ttft: float, itl: float, rate: float = 10
) -> dict[str, object]:
    return {
        "policy": policy, "rate_rps": rate, "energy_j": energy_j, "ttft_attainment": ttft,
        "itl_attainment": itl,
    }  # fmt: skip


def test_best_pair_is_the_cheapest_that_keeps_the_slo() -> None:
    table = compare(
        pd.DataFrame(
            [
                row("static-max", 200.0, 1.0, 1.0),
                row("static pair 1005/1005", 100.0, 1.0, 0.98),
                row("static pair 1005/1200", 140.0, 0.99, 1.0),
                row("static pair 1200/1200", 150.0, 1.0, 1.0),
                row("thrifty", 90.0, 0.5, 0.5),
            ]
        )
    ).set_index("policy")
    assert list(table.index) == ["static-max", "thrifty", "best static pair"]
    assert table.loc["best static pair", "clocks"] == "1005/1200"
    assert table.loc["best static pair", "saving_pct"] == pytest.approx(30.0)
    assert not table.loc["thrifty", "keeps_slo"]


def test_where_no_pair_keeps_the_slo_the_least_bad_one_stands() -> None:
    table = compare(
        pd.DataFrame(
            [
                row("static-max", 200.0, 0.7, 0.9),
                row("static pair 1005/1005", 100.0, 0.3, 0.9),
                row("static pair 1410/1410", 200.0, 0.7, 0.9),
            ]
        )
    ).set_index("policy")
    assert table.loc["best static pair", "clocks"] == "1410/1410"
    assert not table.loc["best static pair", "keeps_slo"]


def test_without_a_baseline_there_is_no_saving() -> None:
    with pytest.raises(VoltanaError, match="no static-max at rate 10"):
        compare(pd.DataFrame([row("ecofreq", 1.0, 1.0, 1.0)]))
