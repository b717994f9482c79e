"""Servers that say nothing: who waits, who hangs, and what a policy's failure costs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.hwreplay.router.scripted_server import chunked
from tests.hwreplay.router.test_router import bench, events, request_body, until
from tests.hwreplay.router.test_router_edges import TOKEN, between
from tests.hwreplay.stub_worker import StubTimes
from voltana.sim.policies.base import InstanceState, RequestView

STALE: dict[str, Any] = {"stale_s": 0.3, "health_period_s": 0.05}


def test_a_decode_server_that_waits_for_a_long_prefill_is_left_alone(tmp_path: Path) -> None:
    """It has open requests and reports no iteration for 1 s, as SGLang's does: heartbeats come
    only when no queue holds anything."""

    async def play() -> None:
        template = f"ipc://{tmp_path}/{{phase}}-{{index}}"
        times = StubTimes(prefill_token_s=0.01)
        async with bench(times=times, metrics=template, **STALE) as b:
            await asyncio.sleep(0.3)  # until the subscriptions stand
            assert (await b.generate(1, 2))[0] == 200
            decode = b.service.fleet.workers["decode"][0]

            async def has_feed() -> bool:
                return decode.tracker.has_feed

            await until(has_feed)
            asked = asyncio.create_task(b.generate(100, 2))
            while not asked.done():
                assert decode.is_healthy
                assert not decode.is_suspect
                await asyncio.sleep(0.02)
            status, data = await asked
            assert status == 200
            assert len(events(data)) == 2

    asyncio.run(play())


@pytest.mark.parametrize("has_metrics", [True, False])
def test_a_hung_scheduler_gets_no_new_requests_and_keeps_its_own(
    tmp_path: Path, *, has_metrics: bool
) -> None:
    """Its health check answers all the while. With plain URLs the streams alone tell."""

    async def play() -> None:
        template = f"ipc://{tmp_path}/{{phase}}-{{index}}" if has_metrics else None
        times = StubTimes(decode_base_s=0.02)
        async with bench(1, 2, times=times, metrics=template, **STALE) as b:
            hung, other = b.fleet.decode
            asked = asyncio.create_task(b.generate(4, 30))
            await asyncio.sleep(0.3)
            hung.is_hung = True
            worker = b.service.fleet.workers["decode"][0]

            async def is_suspect() -> bool:
                return (await b.samples())[("voltana_suspect", "decode-0")] == 1

            await until(is_suspect)
            assert worker.is_healthy
            for _ in range(4):
                assert (await b.generate(4, 2))[0] == 200
            assert (len(hung.seen), len(other.seen)) == (1, 4)
            hung.is_hung = False
            status, data = await asked
            assert (status, len(events(data))) == (200, 30)

            async def is_trusted() -> bool:
                return not await is_suspect()

            await until(is_trusted)

    asyncio.run(play())


def test_a_stream_that_stands_still_ends_with_an_error() -> None:
    async def play() -> None:
        decode = [*chunked(TOKEN, is_ended=False), *[b""] * 200]  # 4 s of silence
        async with between(chunked(TOKEN), decode, stall_s=0.3, max_attempts=3) as (b, _, second):
            status, data = await b.generate(2, 5)
            assert status == 200
            message = events(data)[-1]["error"]["message"]
            assert message == "decode-0 has sent nothing for 0.3 s in the middle of a stream"
            assert (await b.samples())[("voltana_failures_total", "stalled")] == 1
            assert len(second.seen) == 1

    asyncio.run(play())


def test_a_timeout_is_not_computed_again_on_another_pair() -> None:
    """Both servers of the pair live and are only late: two more pairs would triple their load."""

    async def play() -> None:
        times = StubTimes(prefill_base_s=1.0)
        async with bench(3, 3, times=times, first_token_s=0.3) as b:
            status, data = await b.generate(4, 2)
            assert status == 502
            assert "makes no token in 0.3 s" in json.loads(data)["error"]["message"]
            assert sum(len(w.seen) for w in b.fleet.prefill) == 1
            assert (await b.samples())[("voltana_retries_total", "")] == 0

    asyncio.run(play())


class Broken:
    """A routing policy that does not do what it should."""

    reads_prompts = False

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def route(
        self, request: RequestView, prefill: list[InstanceState], decode: list[InstanceState]
    ) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize("answer", [ZeroDivisionError(), (-1, 0), (0, 2), (0.0, 0), None, (0,)])
def test_a_policy_that_fails_is_counted_and_requests_go_round_robin(
    answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        async with bench(2, 2) as b:
            b.service.fleet.policy = Broken(answer)  # type: ignore[assignment]
            for _ in range(4):
                async with b.client.post(b.url + "/generate", json=request_body(4, 2)) as response:
                    assert response.status == 200
                    await response.read()
            assert [len(w.seen) for w in b.fleet.workers] == [2, 2, 2, 2]
            assert (await b.samples())[("voltana_routing_errors_total", "")] == 4

    asyncio.run(play())
    (said,) = [r for r in caplog.records if "Broken: route" in r.getMessage()]
    assert said.exc_info is None  # one line, with the policy's name and the value or the place
    is_raised = isinstance(answer, Exception)
    assert ("raised ZeroDivisionError (" if is_raised else repr(answer)) in said.getMessage()
