"""Overhead and fitted iteration times from records made by a known rule."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.profiles.synthetic import make_meta, write_synthetic_profile
from voltana.hwreplay.replay.fit import Step, fit_surface, steps_of, write_fitted_profile
from voltana.hwreplay.replay.load import Row
from voltana.hwreplay.replay.probe import (
    MIN_GAP_S,
    STREAM_TOKENS,
    ProbePlan,
    fit_overhead,
    plan_probe,
)
from voltana.hwreplay.replay.recording import IterationRow
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.records import COMPLETED, FAILED

IDLE_S, BUSY_S, STEP_S, PREFILL_S = 0.020, 0.037, 0.004, 0.010


def rows_of(plan: ProbePlan, *, first_token: str) -> list[Row]:
    """TTFT of each single request by the rule that the fit must undo."""
    own = 1.0 if first_token == "decode" else 0.0
    rows = []
    for index in (*plan.idle, *plan.busy, *plan.streams):
        is_idle = index in plan.idle
        lasts_s = 30.0 if index in plan.streams else 0.1
        known_s = PREFILL_S + (own + (0.0 if is_idle else 0.5)) * STEP_S
        ttft_s = known_s + (IDLE_S if is_idle else BUSY_S)
        sent_s = float(plan.workload.arrival_s[index]) + 0.001
        rows.append(
            Row(
                request_id=index,
                status=COMPLETED,
                sent_s=sent_s,
                first_token_s=sent_s + ttft_s,
                finish_s=sent_s + ttft_s + lasts_s,
                tokens=4,
            )
        )
    return rows


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
def test_overhead_is_what_iterations_do_not_explain(tmp_path: Path, first_token: str) -> None:
    profile = write_synthetic_profile(
        tmp_path / "p",
        time_s=lambda phase, *_: PREFILL_S if phase == "prefill" else STEP_S,
        clocks_mhz=(1000,),
    )
    plan = plan_probe()
    config = make_config({"first_token": first_token})
    found = fit_overhead(rows_of(plan, first_token=first_token), plan, config, profile)
    assert found.idle_s == pytest.approx(IDLE_S, abs=1e-9)
    assert found.busy_s == pytest.approx(BUSY_S, abs=1e-9)
    assert found.step_s == pytest.approx(STEP_S)
    assert found.expected_s(0.5) == pytest.approx((IDLE_S + BUSY_S) / 2)


def test_a_probe_that_failed_is_no_measurement(tmp_path: Path) -> None:
    profile = write_synthetic_profile(tmp_path / "p")
    plan = plan_probe()
    rows = [Row(request_id=i, status=FAILED, sent_s=0.0) for i in range(len(plan.workload))]
    with pytest.raises(VoltanaError, match="half of its single requests"):
        fit_overhead(rows, plan, make_config({}), profile)


def test_the_plan_keeps_single_requests_apart() -> None:
    plan = plan_probe()
    work = plan.workload
    assert len(work) == len(work.arrival_s)
    assert np.diff(work.arrival_s[list(plan.idle)]).min() >= MIN_GAP_S
    assert (work.output_tokens[list(plan.streams)] == STREAM_TOKENS[1]).all()
    assert len(plan.busy) == len(plan.idle)
    assert not set(plan.streams) & set(plan.busy)


def test_a_stream_that_ends_early_leaves_nobody_beside_it(tmp_path: Path) -> None:
    profile = write_synthetic_profile(tmp_path / "p")
    plan = plan_probe()
    rows = [
        msgspec.structs.replace(row, finish_s=row.first_token_s)
        for row in rows_of(plan, first_token="decode")
    ]
    with pytest.raises(VoltanaError, match="0 of 24 were beside a stream"):
        fit_overhead(rows, plan, make_config({}), profile)


def test_the_fit_finds_the_rule_under_one_sided_noise() -> None:
    """Every fifth iteration takes three times as long: a median is not moved by it, a mean is."""
    rng = np.random.default_rng(3)
    steps = []
    for index in range(3000):
        batch_size, context = int(rng.integers(1, 9)), int(rng.integers(20, 600))
        time_s = 0.002 + 2e-4 * batch_size + 5e-7 * batch_size * context
        noise = 3.0 if index % 5 == 0 else 1.0
        steps.append(Step(batch_size, batch_size * context, time_s * noise))
    found = fit_surface(steps, "decode")
    for batch_size, tokens in ((1, 100), (4, 1200), (8, 4000)):
        true_s = 0.002 + 2e-4 * batch_size + 5e-7 * tokens
        assert found.time_s(batch_size, tokens) == pytest.approx(true_s, rel=0.01)


def test_a_step_between_batch_sizes_stays_where_it_is() -> None:
    """1 ms more from one request to two and nothing from there to four: no line has both."""
    rule = {1: 0.002, 2: 0.003, 3: 0.003, 4: 0.003, 8: 0.005}
    steps = [Step(b, 100 * b, rule[b]) for b in rule for _ in range(10)]
    found = fit_surface(steps, "decode")
    for batch_size, time_s in rule.items():
        assert found.time_s(batch_size, 100 * batch_size) == pytest.approx(time_s, rel=0.01)
    assert found.time_s(16, 1600) == pytest.approx(0.009, rel=0.01)  # the last slope goes on


def test_attention_of_a_prompt_is_quadratic() -> None:
    sizes = [(b, n) for b in (1, 2, 4) for n in (16, 64, 256, 512, 1024, 2048)]
    rule = [0.002 + 1e-3 * b + 1e-5 * b * n + 8e-9 * (b * n) ** 2 / b for b, n in sizes]
    steps = [Step(b, b * n, time_s) for (b, n), time_s in zip(sizes, rule, strict=True)]
    found = fit_surface(steps, "prefill")
    assert found.coefficients_s == pytest.approx((0.003, 1e-5, 8e-9, 1e-3), rel=0.02)
    with pytest.raises(VoltanaError, match="10 prefill iterations, got 3"):
        fit_surface(steps[:3], "prefill")


def test_decode_steps_count_from_boundary_to_boundary() -> None:
    """Ends at 1.000, 1.004 and 1.009 s, then a pause: two steps of 4 and 5 ms, and no third."""
    ends_s = (1.000, 1.004, 1.009, 2.0)
    rows = [IterationRow("decode", 0, end_s - 0.003, 0.003, 0.003, 2, 50) for end_s in ends_s]
    steps = steps_of(rows, "decode")
    assert [step.time_s for step in steps] == pytest.approx([0.004, 0.005])
    assert [(step.batch_size, step.tokens) for step in steps] == [(2, 50)] * 2


def test_a_fitted_profile_says_where_it_is_from(tmp_path: Path) -> None:
    decode = fit_surface([Step(b, 100 * b, 0.001 * b) for b in range(1, 12)], "decode")
    prefill = fit_surface([Step(1, 10 * n, 1e-4 * n) for n in range(1, 12)], "prefill")
    config = make_config({"kv_capacity_tokens": 8192, "max_running_requests": 16})
    made = write_fitted_profile(
        tmp_path / "p", [prefill, decode], make_meta((700, 1000)), config, 50.0
    )
    assert made.clocks_mhz == (1000,)
    assert made.meta.engine.kv_capacity_tokens == 8192
    assert made.meta.provenance["decode_time"].status == "measured"
    assert made.meta.provenance["decode_power"].status == "modelled"
    assert made.truth().predict_s("decode", 0, 4, 1024) == pytest.approx(decode.time_s(4, 1024))
    assert made.truth().power_w("prefill", 0, 1, 64) == 50.0
