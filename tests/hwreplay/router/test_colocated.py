"""The router in front of servers that do both phases: one request to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.hwreplay.router.test_router import Bench, events, request_body, serving, until
from tests.hwreplay.stub_worker import StubTimes, stub_fleet
from voltana.hwreplay.router.config import counts_of, read_workers
from voltana.hwreplay.router.sink import DECODE_HEADER, PREFILL_HEADER
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.requests import Prompt


@asynccontextmanager
async def bench(
    number: int,
    times: StubTimes | None = None,
    metrics: str | None = None,
    sim: Mapping[str, object] = MappingProxyType({}),
) -> AsyncIterator[Bench]:
    async with (
        stub_fleet(0, 0, times, metrics, num_colocated=number) as fleet,
        serving(fleet.table(metrics), sim=sim) as (service, client, url),
    ):
        yield Bench(fleet=fleet, service=service, client=client, url=url)


def test_a_request_goes_to_one_server_as_it_came() -> None:
    """Round-robin over two, no KV to hand over, and both headers name the one."""

    async def play() -> None:
        async with bench(2) as b:
            names, body = [], request_body(8, 4)
            for _ in range(4):
                async with b.client.post(b.url + "/generate", json=body) as answer:
                    assert answer.status == 200
                    data = await answer.read()
                    names.append((answer.headers[PREFILL_HEADER], answer.headers[DECODE_HEADER]))
                assert [e["meta_info"]["completion_tokens"] for e in events(data)] == [1, 2, 3, 4]
            assert names == [("0", "0"), ("1", "1")] * 2
            assert [len(w.seen) for w in b.fleet.workers] == [2, 2]
            assert all(seen == body for w in b.fleet.workers for seen in w.seen)
            assert (await b.counts())["completed"] == 4
            samples = await b.samples()
            assert samples[("voltana_open_requests", "colocated-0")] == 0

    asyncio.run(play())


def test_a_router_of_prefixes_sees_what_token_ids_share() -> None:
    """Memory for 100 tokens: the second server has 60 and 1 that part after 30 when 60 more come.

    What was used longest ago goes, the 30 behind that. Round-robin would alternate.
    """

    async def play() -> None:
        told = {"router": "prefix-affinity", "num_colocated": 2, "kv_capacity_tokens": 100}
        async with bench(2, sim={**told, "colocated_cache": True}) as b:
            first, second, third = ([start, *range(1, 60)] for start in (400, 401, 402))

            async def where(ids: list[int]) -> int:
                body = {**request_body(1, 2), "input_ids": ids}
                async with b.client.post(b.url + "/generate", json=body) as answer:
                    await answer.read()
                    return int(answer.headers[DECODE_HEADER])

            states = [w.tracker.state for w in b.service.fleet.workers["colocated"]]
            assert await where(first) == 0
            states[0].open_requests = 1  # a tie goes to the server with fewer
            assert await where(second) == 1
            states[0].open_requests = 0
            assert [await where([*second[:30], 7]), await where(first)] == [1, 0]
            prompt = Prompt(second, [1] * 60)
            assert [state.count_cached(prompt) for state in states] == [0, 59]
            states[0].open_requests = 1
            assert await where(third) == 1
            states[0].open_requests = 0
            assert [state.count_cached(prompt) for state in states] == [0, 30]
            await b.fleet.colocated[1].die()  # and with it what it had cached
            assert await where(second) == 0
            assert [state.count_cached(prompt) for state in states] == [59, 0]

    asyncio.run(play())


def test_a_request_that_has_not_begun_goes_to_another_server() -> None:
    async def play() -> None:
        async with bench(2) as b:
            await b.fleet.colocated[0].die()
            for _ in range(2):
                status, _ = await b.generate(8, 2)
                assert status == 200
            assert len(b.fleet.colocated[1].seen) == 2

    asyncio.run(play())


def test_the_state_follows_prompts_and_tokens(tmp_path: Path) -> None:
    """The stub's iterations are long enough to be looked at: a prompt, then a decode batch."""

    async def play() -> None:
        times = StubTimes(prefill_base_s=0.1, decode_base_s=0.05)
        async with bench(1, times, f"ipc://{tmp_path}/{{phase}}-{{index}}") as b:
            worker = b.service.fleet.workers["colocated"][0]
            state = worker.tracker.state
            await b.generate(8, 2)  # the feed is heard from here on
            task = asyncio.create_task(b.generate(30, 8))

            async def waits() -> bool:
                return (state.num_waiting, state.waiting_tokens, state.open_requests) == (1, 30, 1)

            await until(waits)

            async def decodes() -> bool:
                return state.num_running == 1 and state.num_waiting == 0 and state.kv_tokens > 31

            await until(decodes)
            await task
            assert (state.open_requests, state.num_running, state.kv_tokens) == (0, 0, 0)
            assert not state.is_busy

    asyncio.run(play())


def test_a_fleet_is_of_one_kind() -> None:
    workers = read_workers({"colocated": ["http://h:1", "http://h:2"]}, "f")
    assert [w.name for w in workers] == ["colocated-0", "colocated-1"]
    assert counts_of(workers) == {"num_colocated": 2}
    with pytest.raises(VoltanaError, match="colocated servers, or prefill and decode ones"):
        read_workers({"colocated": ["http://h:1"], "decode": ["http://h:2"]}, "f")
