"""Where the spread of iteration times comes from, by hand-made tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.profiles.synthetic import make_meta, write_synthetic_profile
from voltana.profiles.build.spread import SPREAD, spread_evidence
from voltana.profiles.catalog import load_profile, write_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.optional.spread import IterationSpread, row_spreads
from voltana.profiles.schema import Provenance, SpreadMeta, meta_toml, read_meta

ROWS = [  # clock, batch, tokens, trial, time_s, half the interquartile range
    (700, 1, 10, 0, 1.0, 0.06745),
    (700, 1, 10, 1, 1.0, 0.20235),
    (700, 1, 99, 0, 2.0, 0.2698),  # relative 0.1, 0.3 and 0.2: the median is 0.2
    (700, 8, 99, 0, 2.0, 0.0),
    (1400, 4, 99, 0, 0.5, 0.0337250),  # 0.1
]


def test_the_measured_spread_of_a_row_is_a_median_and_holds_up_to_the_next() -> None:
    columns = ["frequency_mhz", "batch_size", "tokens", "trial", "time_s", "spread_s"]
    rows = row_spreads(pd.DataFrame(ROWS, columns=columns))
    assert rows is not None
    spread = IterationSpread({"prefill": 0.03}, {"decode": rows}, 1400)
    for clock, batch, expected in (
        (700, 1, 0.2), (700, 7, 0.2), (700, 8, 0.0), (1395, 1, 0.2), (1400, 1, 0.1), (0, 4, 0.1),
        (1400, 64, 0.1),
    ):  # fmt: skip
        assert spread.relative("decode", clock, batch) == pytest.approx(expected), (clock, batch)
    assert spread.relative("prefill", 700, 0.4) == 0.03
    assert not spread.is_zero("decode")
    assert IterationSpread({}, {"decode": {700: {1: 0.0}}}, 1400).is_zero("decode")
    assert IterationSpread({}, {}, 1400).is_zero("prefill")


def test_a_table_s_own_spread_goes_before_the_stated_one(tmp_path: Path) -> None:
    measured = write_synthetic_profile(
        tmp_path / "a", time_s=lambda p, f, b, t: 0.5, spread_s=lambda p, f, b, t: 0.006745
    )
    said = {
        **measured.meta.provenance,
        "iteration_spread": Provenance(status="modelled", source="x"),
    }
    meta = replace(measured.meta, spread=SpreadMeta(prefill=0.3, decode=0.4), provenance=said)
    bare = measured.prefill.drop(columns="spread_s")
    both = write_profile(tmp_path / "b", meta, bare, measured.decode, measured.idle)
    assert both.spread().relative("prefill", 700, 1) == 0.3
    assert both.spread().relative("decode", 700, 1) == pytest.approx(0.02)


def test_a_stated_spread_says_where_it_is_from_and_is_a_share(tmp_path: Path) -> None:
    meta = make_meta((700, 1400))
    with pytest.raises(VoltanaError, match="provenance must be stated for iteration_spread"):
        replace(meta, spread=SpreadMeta(prefill=0.1, decode=0.1))
    with pytest.raises(VoltanaError, match=r"must be < 1, got 0\.1 and 2"):
        SpreadMeta(prefill=0.1, decode=2.0)
    path = tmp_path / "profile.toml"
    path.write_text(meta_toml(meta))
    assert read_meta(path).spread is None
    text = meta_toml(meta) + "\n[spread]\nprefill = 0.1\n"
    path.write_text(text)
    with pytest.raises(VoltanaError, match=r"missing key 'decode' of \[spread\]"):
        read_meta(path)


def test_the_shipped_spread_lies_within_its_evidence(shared_data: Path) -> None:
    """Between the least and the most that the sources allow, and as the provenance prints them."""
    evidence = spread_evidence(shared_data / "dvfs")
    assert evidence.decode_requests < SPREAD.decode < evidence.decode_steps
    assert evidence.decode_kernels_apart < SPREAD.decode
    assert evidence.prefill_requests[0] < SPREAD.prefill < evidence.prefill_requests[1]
    for name in ("a100-80g-sxm/llama-3.1-8b", "a100-80g-sxm-panel/qwen3-32b-tp2"):
        meta = load_profile(name).meta
        assert meta.spread == SPREAD
        assert evidence.text() in meta.provenance["iteration_spread"].source
