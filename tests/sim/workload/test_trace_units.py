"""Traces whose times are in another unit, dates, or counted from 1970; files of lengths alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from voltana.experiments.runs import workload_of
from voltana.experiments.sweep.identity import run_key
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import SimConfig, make_config
from voltana.sim.workload.generate import make_workload
from voltana.sim.workload.traces import open_trace, read_lengths

GAPS_S = np.array([0.0, 0.25, 0.5, 3.0])
START_S = 1_700_000_000
INPUTS, OUTPUTS = [100, 200, 300, 400], [10, 20, 30, 40]
COLUMNS = {
    "plain": ("arrival_s", "input_tokens", "output_tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
}
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def write(path: Path, fmt: str, times: Any) -> str:  # noqa: ANN401 (numbers, dates or durations)
    names = COLUMNS[fmt]
    frame = pd.DataFrame({names[0]: times, names[1]: INPUTS, names[2]: OUTPUTS})
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False)
    return str(path)


@pytest.mark.parametrize("unit", PER_SECOND)
@pytest.mark.parametrize("fmt", ["plain", "mooncake", "burstgpt"])
def test_times_since_1970_are_refused_and_their_unit_named(
    tmp_path: Path, fmt: str, unit: str
) -> None:
    """What the message advises makes the trace run, from its first request on."""
    times = [round((START_S + gap) * PER_SECOND[unit]) for gap in GAPS_S]
    if unit == "s":
        times = list(START_S + GAPS_S)
    name = write(tmp_path / "trace.csv", fmt, times)
    if (fmt, unit) == ("burstgpt", "s"):  # counts in seconds, from its first request
        assert np.allclose(open_trace(name).arrival_s, GAPS_S)
    else:
        with pytest.raises(VoltanaError, match=r"^[^\n]*$") as caught:
            open_trace(name)
        assert f"as {unit} since 1970 is 2023-11-14: set trace_unit={unit}" in str(caught.value)
        assert "trace.csv:2)" in str(caught.value)
    # a float holds a time since 1970 to a quarter of a microsecond
    assert np.allclose(open_trace(name, unit=unit).arrival_s, GAPS_S, atol=1e-6)


def test_the_unit_is_a_key_of_the_configuration(tmp_path: Path) -> None:
    name = write(tmp_path / "trace.csv", "plain", (START_S + GAPS_S) * 1e3)
    config = make_config({"trace": name, "trace_unit": "ms"})
    assert np.allclose(workload_of(config).arrival_s, GAPS_S, atol=1e-6)
    assert SimConfig().as_dict().keys().isdisjoint({"trace_unit", "trace_drop_failed"})
    with pytest.raises(VoltanaError, match="trace_unit must be one of s, ms, us, ns, got 'min'"):
        make_config({"trace": name, "trace_unit": "min"})


def test_a_unit_speaks_of_numbers_near_zero_too(tmp_path: Path) -> None:
    """Nothing in them tells milliseconds from seconds."""
    name = write(tmp_path / "trace.csv", "plain", GAPS_S * 1e3)
    assert open_trace(name).duration_s == 3000
    assert open_trace(name, unit="ms").duration_s == 3


def test_a_trace_that_starts_days_after_zero(tmp_path: Path) -> None:
    late = write(tmp_path / "late.csv", "plain", GAPS_S + 3 * 86_400)
    with pytest.raises(VoltanaError, match="3 days after the start: set trace_unit to s, ms, us"):
        open_trace(late)
    within = write(tmp_path / "within.csv", "plain", GAPS_S + 86_400 - 10)
    assert open_trace(within).arrival_s[0] == 86_390


@pytest.mark.parametrize("fmt", COLUMNS)
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_dates_of_a_parquet_file_are_dates_in_every_format(
    tmp_path: Path, fmt: str, zone: str | None
) -> None:
    dates = pd.Timestamp("2024-02-28 23:59:59") + pd.to_timedelta(GAPS_S, unit="s")
    name = write(tmp_path / "trace.parquet", fmt, dates.tz_localize(zone))
    assert np.allclose(open_trace(name).arrival_s, GAPS_S)
    with pytest.raises(VoltanaError, match="leave trace_unit out"):
        open_trace(name, unit="s")


def test_durations_of_a_parquet_file(tmp_path: Path) -> None:
    name = write(tmp_path / "a.parquet", "plain", pd.to_timedelta(GAPS_S + 9e6, unit="s"))
    assert np.allclose(open_trace(name).arrival_s, GAPS_S)


def test_a_missing_date_says_where(tmp_path: Path) -> None:
    dates = [pd.Timestamp("2024-02-28"), None, pd.Timestamp("2024-02-28"), None]
    name = write(tmp_path / "a.parquet", "plain", dates)
    with pytest.raises(VoltanaError, match=r"arrival_s must be a date and time, got NaT"):
        open_trace(name)


def test_what_the_message_about_failed_requests_advises_exists(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n5,10,20\n6,10,0\n7,10,30\n")
    with pytest.raises(VoltanaError, match="must be >= 1") as caught:
        workload_of(make_config({"trace": str(path)}))
    advice = str(caught.value).partition("(")[2].partition(" ")[0]
    key, _, value = advice.partition("=")
    made = workload_of(make_config({"trace": str(path), key: value}))
    assert made.output_tokens.tolist() == [20, 30]
    assert "1 of 3 without output left out" in made.name


BROKEN = {
    "json.json": ('[{"timestamp": 0, "input_length": 1, "output_length": 1}]', "JSON lines"),
    "bool.csv": ("arrival_s,input_tokens,output_tokens\n0,True,1\n", "whole number, got True"),
    "half.csv": ("arrival_s,input_tokens,output_tokens\n0,1.5,1\n", "whole number, got 1.5"),
    "comma.csv": ("arrival_s;input_tokens;output_tokens\n0;1;1\n", "of no known format"),
    "quote.csv": ('arrival_s,input_tokens,output_tokens\n"0,1,1\n', "cannot read"),
    "more.csv": ("arrival_s,input_tokens,output_tokens\n0,1,1,7\n", "more fields than"),
    "text.csv": ("arrival_s,input_tokens,output_tokens\nx,1,1\n", "number of seconds, got x"),
    "date.csv": ("arrival_s,input_tokens,output_tokens\n2024-01-01,1,1\n", "got 2024-01-01"),
    "gap.csv": ("arrival_s,input_tokens,output_tokens\n0,1,1\n,1,1\n", "got nan"),
    "minus.csv": ("arrival_s,input_tokens,output_tokens\n-1,1,1\n", "must be >= 0, got -1"),
    "back.csv": ("arrival_s,input_tokens,output_tokens\n1,1,1\n0,1,1\n", "sort the file, got 0"),
    "huge.csv": ("arrival_s,input_tokens,output_tokens\n0,9999999999,1\n", "must be <= 2147483648"),
    "head.csv": ("arrival_s,input_tokens,output_tokens\n", "holds no requests"),
    "empty.csv": ("", "No columns to parse"),
    "cut.jsonl": ('{"timestamp": 0, "input_length": 1, "outp', "cannot read"),
    "list.jsonl": ('{"timestamp": 0, "input_length": [1], "output_length": 1}\n', "got [1]"),
    "zip.csv.gz": ("no zip", "cannot read"),
    "a.parquet": ("no parquet", "cannot read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_with_its_name(tmp_path: Path, name: str) -> None:
    text, words = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(VoltanaError, match=r"^[^\n]*$") as caught:
        open_trace(str(tmp_path / name))
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    for suffix, line in (("csv", 3), ("jsonl", 2)):
        name = write(tmp_path / f"a.{suffix}", "mooncake", [5, 4, 6, 7])
        with pytest.raises(VoltanaError, match=rf"a\.{suffix}:{line}\)"):
            open_trace(name)


@pytest.mark.parametrize("fmt", COLUMNS)
def test_a_file_of_lengths_is_a_workload(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / "lengths.csv"
    names = COLUMNS[fmt][1:]
    pd.DataFrame({names[0]: INPUTS, names[1]: OUTPUTS}).to_csv(path, index=False)
    made = make_workload(str(path), rate_rps=50, duration_s=80, seed=3)
    assert len(made) == 4000
    pairs, counts = np.unique([made.input_tokens, made.output_tokens], axis=1, return_counts=True)
    assert pairs.T.tolist() == list(map(list, zip(INPUTS, OUTPUTS, strict=True)))
    # binomial(4000, 1/4): mean 1000, spread 27
    assert (abs(counts - 1000) < 5 * 27.4).all()
    again = make_workload(str(path), rate_rps=50, duration_s=80, seed=3)
    assert again.content_hash == made.content_hash
    other = make_workload(str(path), rate_rps=50, duration_s=80, seed=4)
    assert other.content_hash != made.content_hash
    # arrivals are those of any other workload
    assert (
        made.arrival_s == make_workload("lmsys", rate_rps=50, duration_s=80, seed=3).arrival_s
    ).all()


def test_lengths_are_told_from_traces(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("input_tokens,output_tokens\n5,6\n7,8\n")
    with pytest.raises(VoltanaError, match=r"lengths and no arrivals.*give it as a workload"):
        open_trace(str(lengths))
    trace = write(tmp_path / "trace.csv", "plain", GAPS_S)
    assert [column.tolist() for column in read_lengths(Path(trace))] == [INPUTS, OUTPUTS]
    for name, words in (
        ("lengths.cvs", "no such file of lengths"),
        ("lengths", "unknown workload"),
    ):
        with pytest.raises(VoltanaError, match=words):
            make_workload(
                str(tmp_path / name) if "." in name else name, rate_rps=1, duration_s=1, seed=0
            )
    lengths.write_text("prompt,answer\n5,6\n")
    with pytest.raises(VoltanaError, match=r"must have columns of lengths .* got prompt, answer"):
        make_workload(str(lengths), rate_rps=1, duration_s=1, seed=0)


def test_a_kept_result_knows_the_files_content(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens\n5,6\n")
    before = run_key(SimConfig(workload=str(path)))
    path.write_text("input_tokens,output_tokens\n5,60\n")
    assert run_key(SimConfig(workload=str(path))) != before
