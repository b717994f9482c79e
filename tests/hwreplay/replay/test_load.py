"""The load generator: exact lengths, exact counting, never slowed by the server."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.hwreplay.router.test_router import Bench, bench
from tests.hwreplay.stub_worker import StubTimes
from voltana.hwreplay.clock import RunClock
from voltana.hwreplay.replay.load import LoadConfig, LoadGenerator, LoadReport, Row, read_rows
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.records import CANCELLED, COMPLETED, FAILED, REJECTED
from voltana.sim.workload.prompts import Turns
from voltana.sim.workload.workload import Workload


def workload(arrival_s: list[float], inputs: list[int], outputs: list[int]) -> Workload:
    return Workload(
        arrival_s=np.array(arrival_s),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
    )


async def send(b: Bench, work: Workload, path: Path, drain_s: float = 20.0) -> LoadReport:
    config = LoadConfig(url=b.url, drain_s=drain_s)
    return await LoadGenerator(work, config, RunClock(), path).run()


def test_lengths_are_exact_and_prompts_differ(tmp_path: Path) -> None:
    async def play() -> None:
        work = workload([0.0, 0.01, 0.02], [3, 700, 50], [1, 5, 9])
        async with bench() as b:
            await send(b, work, tmp_path / "rows")
            seen = sorted(b.fleet.decode[0].seen, key=lambda body: len(body["input_ids"]))
            assert [len(body["input_ids"]) for body in seen] == [3, 50, 700]
            assert [body["sampling_params"]["max_new_tokens"] for body in seen] == [1, 9, 5]
            assert all(body["sampling_params"]["ignore_eos"] for body in seen)
            assert all(3 <= i < 512 for body in seen for i in body["input_ids"])
            assert seen[1]["input_ids"] != seen[2]["input_ids"][:50]
        rows = {row.request_id: row for row in read_rows(tmp_path / "rows")}
        assert [rows[i].tokens for i in range(3)] == [1, 5, 9]
        assert [len(rows[i].gaps_s) for i in range(3)] == [0, 4, 8]
        assert all(row.status == COMPLETED for row in rows.values())

    asyncio.run(play())


def test_the_server_cannot_slow_it(tmp_path: Path) -> None:
    """A server that needs 0.4 s a prompt has all 40 requests after 0.4 s."""

    async def play() -> None:
        work = workload([0.01 * i for i in range(40)], [4] * 40, [2] * 40)
        async with bench(times=StubTimes(prefill_base_s=0.4)) as b:
            report = await send(b, work, tmp_path / "rows")
        rows = read_rows(tmp_path / "rows")
        first_end_s = min(row.finish_s for row in rows if row.finish_s is not None)
        assert max(row.sent_s for row in rows) < first_end_s + 0.4
        sent_s = np.array([row.sent_s for row in sorted(rows, key=lambda r: r.request_id)])
        late = sent_s - work.arrival_s
        assert late.min() > -1e-6
        assert report.as_dict()["lateness_s"]["max"] == pytest.approx(late.max(), abs=1e-5)
        assert report.counts == {"completed": 40}

    asyncio.run(play())


def test_token_times_are_the_servers(tmp_path: Path) -> None:
    """Prefill 0.1 s, steps of 0.05 s: the first token after 0.15 s, ten gaps of 0.05 s."""

    async def play() -> None:
        times = StubTimes(prefill_base_s=0.1, decode_base_s=0.05)
        async with bench(times=times) as b:
            await send(b, workload([0.0], [4], [11]), tmp_path / "rows")
        (row,) = read_rows(tmp_path / "rows")
        assert row.first_token_s is not None
        assert row.finish_s is not None
        assert row.first_token_s >= 0.15
        assert row.finish_s - row.first_token_s == pytest.approx(0.5, abs=0.1)
        assert np.median(row.gaps_s) == pytest.approx(0.05, abs=0.02)
        assert sum(row.gaps_s) == pytest.approx(row.finish_s - row.first_token_s, abs=1e-4)

    asyncio.run(play())


def test_every_end_is_counted(tmp_path: Path) -> None:
    """429 is a rejection, 502 a failure, a stream that breaks a failure with its reason."""

    async def play() -> None:
        async with bench(times=StubTimes(prefill_base_s=0.3), max_open=1, max_queued=1) as b:
            report = await send(b, workload([0.0] * 5, [4] * 5, [2] * 5), tmp_path / "a")
            assert report.counts == {"completed": 2, "rejected": 3}
            assert [k[:4] for k in report.reasons] == ["429:"]
        async with bench() as b:
            b.fleet.decode[0].abort_after = 2
            report = await send(b, workload([0.0], [4], [9]), tmp_path / "b")
            assert report.counts == {"failed": 1}
            (row,) = read_rows(tmp_path / "b")
            assert row.tokens == 2
            assert row.finish_s is None
            assert "KV transfer failed" in row.reason
            await b.fleet.decode[0].die()
            report = await send(b, workload([0.0], [4], [9]), tmp_path / "c")
            assert report.counts == {"failed": 1}
        statuses = [r.status for name in "abc" for r in read_rows(tmp_path / name)]
        assert sorted(statuses) == [COMPLETED] * 2 + [REJECTED] * 3 + [FAILED] * 2

    asyncio.run(play())


def test_what_takes_too_long_is_cancelled_upstream_too(tmp_path: Path) -> None:
    async def play() -> None:
        async with bench(times=StubTimes(decode_base_s=0.05)) as b:
            work = workload([0.0, 0.0], [4, 4], [3, 100_000])
            report = await send(b, work, tmp_path / "rows", drain_s=1.0)
            assert report.counts == {"completed": 1, "cancelled": 1}
            await asyncio.sleep(0.3)
            assert b.fleet.decode[0].cancelled == 1
        rows = {row.request_id: row for row in read_rows(tmp_path / "rows")}
        assert rows[1].status == CANCELLED
        assert rows[1].tokens > 3

    asyncio.run(play())


def test_a_turn_comes_its_think_time_after_the_answer_before_it(tmp_path: Path) -> None:
    """Two sessions; the second one's first answer breaks off, and its next turn is never sent."""

    async def play() -> LoadReport:
        turns = Turns(previous=np.array([-1, -1, 0, 1, 2]), think_s=np.array([0, 0, 0.2, 0, 0.1]))
        work = dataclasses.replace(
            workload([0.0, 0.3, 0.3, 0.3, 0.5], [4] * 5, [5, 9, 5, 5, 1]), turns=turns
        )
        async with bench(times=StubTimes(decode_base_s=0.02)) as b:
            b.fleet.decode[0].abort_after = 6
            return await send(b, work, tmp_path / "rows")

    report = asyncio.run(play())
    assert report.counts == {"completed": 3, "failed": 1}
    assert report.is_complete
    rows = {row.request_id: row for row in read_rows(tmp_path / "rows")}
    assert sorted(rows) == [0, 1, 2, 4]
    assert rows[0].arrival_s is rows[1].arrival_s is None
    for before, row, think_s in ((0, 2, 0.2), (2, 4, 0.1)):
        finish_s, arrival_s = rows[before].finish_s, rows[row].arrival_s
        assert finish_s is not None
        assert arrival_s is not None
        assert arrival_s == pytest.approx(finish_s + think_s, abs=2e-6)
        assert rows[row].sent_s >= arrival_s - 2e-6


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    async def play() -> None:
        async with bench() as b:
            work = workload([0.0] * 5 + [60.0], [4] * 6, [2] * 6)
            generator = LoadGenerator(work, LoadConfig(url=b.url), RunClock(), tmp_path / "rows")
            task = asyncio.create_task(generator.run())
            await asyncio.sleep(1.0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not generator.report.is_complete

    asyncio.run(play())
    path = tmp_path / "rows"
    assert sorted(row.request_id for row in read_rows(path)) == [0, 1, 2, 3, 4]
    path.write_bytes(path.read_bytes()[:-5])
    assert len(read_rows(path)) == 4
    path.write_bytes(b"{\n")
    with pytest.raises(VoltanaError, match="line 1 must be a request's row"):
        read_rows(path)


def test_a_row_is_kept_to_the_microsecond(tmp_path: Path) -> None:
    async def play() -> None:
        async with bench() as b:
            await send(b, workload([0.0], [4], [3]), tmp_path / "rows")

    asyncio.run(play())
    (row,) = read_rows(tmp_path / "rows")
    assert isinstance(row, Row)
    assert row.sent_s == round(row.sent_s, 6)
    assert (row.prefill_id, row.decode_id) == (0, 0)
