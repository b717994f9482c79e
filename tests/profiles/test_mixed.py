"""Iterations of a chunk beside decoding: measured ones are met, and what lies between is a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.profiles.synthetic import make_meta, write_synthetic_profile
from tests.sim.engine.fixtures import make_requests, run
from voltana.profiles.catalog import Profile, load_profile, write_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.optional.mixed import held_out_errors
from voltana.profiles.schema import Provenance

CLOCKS = (700, 1400)
CHUNKS, BATCHES, CONTEXTS = (16, 128, 1024), (1, 8, 32), (16, 64)
COLUMNS = ["frequency_mhz", "chunk_tokens", "batch_size", "tokens", "trial", "time_s", "power_w"]
STATED = Provenance(status="measured", source="a card of closed forms")


def pass_s(phase: str, clock: int, batch: int, tokens: float) -> float:
    """A card that reads its weights in 8 ms whatever it computes, the cache at 1 µs a token, and
    computes 20 µs a token at the top clock: the longer of reading weights and computing."""
    new = tokens if phase == "prefill" else batch
    read = tokens if phase == "decode" else 0
    return max(0.008, 2e-5 * new * 1400 / clock) + 1e-6 * read


def both_s(clock: int, chunk: int, batch: int, tokens: int) -> float:
    """The same card: weights are read once."""
    return max(0.008, 2e-5 * (chunk + batch) * 1400 / clock) + 1e-6 * tokens


def rows(trials: int = 1) -> pd.DataFrame:
    found = [
        (f, c, b, b * context, k, both_s(f, c, b, b * context), 100.0 + 0.1 * f + 0.05 * c)
        for f in CLOCKS
        for c in CHUNKS
        for b in BATCHES
        for context in CONTEXTS
        for k in range(trials)
    ]
    return pd.DataFrame(found, columns=COLUMNS)


@pytest.fixture
def plain(tmp_path: Path) -> Profile:
    tokens = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
    return write_synthetic_profile(
        tmp_path / "plain", time_s=pass_s, clocks_mhz=CLOCKS, tokens=tokens
    )


def with_rows(of: Profile, directory: Path, table: pd.DataFrame) -> Profile:
    meta = replace(
        make_meta(CLOCKS),
        provenance={**of.meta.provenance} | {"mixed_time": STATED, "mixed_power": STATED},
    )
    return write_profile(directory, meta, of.prefill, of.decode, of.idle, table)


@pytest.fixture
def measured(plain: Profile, tmp_path: Path) -> Profile:
    return with_rows(plain, tmp_path / "measured", rows())


def test_every_measured_point_is_met(measured: Profile) -> None:
    step = measured.mixed_step()
    for row in rows().to_dict("records"):
        chunk, decode = (1.0, row["chunk_tokens"]), (row["batch_size"], row["tokens"])
        time_s, power_w = step.time_and_power(row["frequency_mhz"], chunk, decode)
        assert time_s == pytest.approx(row["time_s"], rel=1e-5)  # six digits in the file
        assert power_w == pytest.approx(row["power_w"], rel=1e-5)


def test_no_iteration_draws_more_than_the_largest_ratio_says(measured: Profile) -> None:
    """Each row's power over the mean power of its parts; the largest is reached, and above 1."""
    step, model = measured.mixed_step(), measured.truth()
    most = 0.0
    for row in rows().to_dict("records"):
        f, chunk, batch = row["frequency_mhz"], row["chunk_tokens"], row["batch_size"]
        alone = [
            model.time_and_power("prefill", f, 1.0, chunk),
            model.time_and_power("decode", f, batch, row["tokens"]),
        ]
        mean_w = sum(s * w for s, w in alone) / sum(s for s, _ in alone)
        most = max(most, row["power_w"] / mean_w)
    assert step.most_power_ratio == pytest.approx(max(most, 1.0), rel=1e-5)
    assert replace(measured, mixed=None).mixed_step().most_power_ratio == 1.0


def test_a_lookup_is_nearer_to_the_card_than_either_end(measured: Profile) -> None:
    """At points that were not measured, against the card itself. No constant share would do: beside
    a small chunk a step is nearly free, beside a large one it costs what its tokens do."""
    model = measured.truth()
    errors: dict[str, list[float]] = {"sum": [], "hidden": [], "lookup": []}
    steps = {
        "sum": measured.mixed_step(overlap_frac=0.0),
        "hidden": measured.mixed_step(overlap_frac=1.0),
        "lookup": measured.mixed_step(),
    }
    for clock, chunk, batch, context in [(700, 64, 4, 32), (1400, 512, 16, 40), (1400, 512, 30, 20),
                                         (1000, 256, 16, 60), (1400, 32, 2, 16)]:  # fmt: skip
        point = (1.0, chunk), (batch, batch * context)
        true_s = both_s(clock, chunk, batch, batch * context)
        for name, step in steps.items():
            time_s, _ = step.time_and_power(clock, *point)
            errors[name].append(abs(time_s / true_s - 1.0))
    worst = {name: max(found) for name, found in errors.items()}
    assert worst["lookup"] < 0.08
    assert worst["lookup"] < 0.8 * min(worst["sum"], worst["hidden"])
    told = np.abs(held_out_errors(rows(), model))[:, 0]
    assert worst["lookup"] < told.max()


def test_a_simulated_iteration_takes_what_was_measured(measured: Profile, plain: Profile) -> None:
    """A decodes alone from 8 ms on; B's prompt of 128 comes meanwhile, runs beside A's next token,
    and its own first one is out a measured iteration later."""
    settings = {"colocated_order": "sglang-mixed", "num_colocated": 1, "num_prefill": 0,
                "num_decode": 0, "controller": "static:f=1400", "record_iterations": True,
                "noise_scale": 0.0}  # fmt: skip
    requests = make_requests((0.0, 15, 4), (0.009, 128, 1))
    record, _ = run(measured, requests, **settings)
    third_s = 0.008 + pass_s("decode", 1400, 1, 15)
    taken_s = record.requests.first_token_s[1] - third_s
    assert taken_s == pytest.approx(both_s(1400, 128, 1, 16), rel=1e-5)
    assert record.iterations is not None
    at = int(np.argmin(np.abs(record.iterations.start_s - third_s)))
    assert record.iterations.energy_j[at] == pytest.approx(taken_s * (240.0 + 6.4), rel=1e-5)
    asked, _ = run(measured, requests, mixed_overlap_frac=0.0, **settings)
    summed, _ = run(plain, requests, **settings)
    assert asked.requests.finish_s.tolist() == summed.requests.finish_s.tolist()
    assert asked.requests.finish_s[1] > record.requests.finish_s[1]


def test_a_draw_of_awake_power_and_trials(measured: Profile, tmp_path: Path) -> None:
    """Trials are medians; awake power is on top of measured iterations as of both tables."""
    table = rows(trials=3)
    table.loc[table["trial"] == 2, "time_s"] *= 5.0
    idle = measured.idle.assign(awake_power_w=30.0)
    awake = replace(with_rows(measured, tmp_path / "three", table), idle=idle)
    point = 1400, (1.0, 128), (8, 512)
    time_s, power_w = awake.mixed_step().time_and_power(*point)
    assert time_s == pytest.approx(both_s(1400, 128, 8, 512), rel=1e-5)
    assert power_w == pytest.approx(240.0 + 6.4 + 30.0, rel=1e-5)


def test_the_table_belongs_to_the_profile(measured: Profile, plain: Profile) -> None:
    assert measured.content_hash != plain.content_hash
    assert measured.directory is not None
    text = (measured.directory / "profile.toml").read_text()
    (measured.directory / "profile.toml").write_text(text.replace("mixed_power", "some_power"))
    with pytest.raises(VoltanaError, match=r"provenance must be stated for mixed_power: .*mixed"):
        load_profile(measured.directory)
    (measured.directory / "profile.toml").write_text(text)
    path = measured.directory / "mixed.csv"
    path.write_text(path.read_text().replace("\n700,16,", "\n700,0,", 1))
    with pytest.raises(VoltanaError, match=r"chunk_tokens must be >= 1, got 0 .*mixed\.csv:2"):
        load_profile(measured.directory)
