"""Whatever goes wrong: the router stays up and completed + failed + cancelled + rejected = sent."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import aiohttp
import pytest

from tests.hwreplay.router.scripted_server import scripted
from tests.hwreplay.router.test_router import Bench, bench, events, request_body, serving, until
from tests.hwreplay.stub_worker import StubTimes, stub_fleet

SLOW = StubTimes(decode_base_s=0.01)


async def settled(b: Bench, sent: int) -> dict[str, float]:
    """The router's counts once every request sent has ended; nothing may be left behind."""

    async def is_settled() -> bool:
        return sum((await b.counts()).values()) == sent

    await until(is_settled, limit_s=20)
    for worker in b.service.fleet.all_workers():
        assert worker.tracker.state.open_requests == 0
        assert not worker.attempts
    samples = await b.samples()
    assert samples[("voltana_in_flight", "")] == samples[("voltana_queued", "")] == 0
    return await b.counts()


def test_a_killed_decode_server_fails_what_it_began_and_the_rest_goes_elsewhere() -> None:
    async def play() -> None:
        async with bench(1, 2, times=SLOW) as b:
            asked = [asyncio.create_task(b.generate(4, 60)) for _ in range(20)]
            await asyncio.sleep(0.2)  # tokens flow on both
            await b.fleet.decode[0].die()
            late = [asyncio.create_task(b.generate(4, 3)) for _ in range(20)]
            answers = await asyncio.gather(*asked)
            whole = [data.endswith(b"[DONE]\n\n") for _, data in answers]
            assert sum(whole) == 10
            for is_whole, (_, data) in zip(whole, answers, strict=True):
                if not is_whole:
                    assert "decode-0 does not answer" in events(data)[-1]["error"]["message"]
            assert all(
                s == 200 and d.endswith(b"[DONE]\n\n") for s, d in await asyncio.gather(*late)
            )
            counts = await settled(b, 40)
            assert counts == {"completed": 30, "failed": 10, "cancelled": 0, "rejected": 0}
            samples = await b.samples()
            assert samples[("voltana_healthy", "decode-0")] == 0
            assert samples[("voltana_failures_total", "server_lost")] == 10

    asyncio.run(play())


@pytest.mark.parametrize(("max_lost", "completed", "retries"), [(1, 10, 0), (2, 20, 10)])
def test_what_a_killed_prefill_server_had_is_tried_elsewhere_only_where_that_is_allowed(
    max_lost: int, completed: int, retries: int
) -> None:
    """Any of the ten may have ended it; who accepts that says so with max_lost = 2."""

    async def play() -> None:
        times = StubTimes(prefill_base_s=0.5)
        async with bench(2, 1, times=times, max_lost=max_lost) as b:
            asked = [asyncio.create_task(b.generate(4, 3)) for _ in range(20)]
            await asyncio.sleep(0.2)
            await b.fleet.prefill[0].die()
            answers = await asyncio.gather(*asked)
            assert sum(d.endswith(b"[DONE]\n\n") for _, d in answers) == completed
            assert (await settled(b, 20))["completed"] == completed
            assert (await b.samples())[("voltana_retries_total", "")] == retries
            seen = [body["input_ids"] for body in b.fleet.prefill[1].seen]
            assert len(seen) == completed  # nothing of what the dead one had
            assert (await b.generate(4, 3))[0] == 200

    asyncio.run(play())


def test_a_connection_that_breaks_on_a_living_server_is_tried_again() -> None:
    """The server answers its health check afterwards: the request did not end it."""

    async def play() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
        async with scripted(head) as broken, stub_fleet(2, 1) as fleet:
            table = fleet.table()
            table["prefill"] = [{"url": broken.url}, table["prefill"][0]]
            async with serving(table) as (service, client, url):
                body = request_body(4, 3)
                async with client.post(url + "/generate", json=body) as answer:
                    assert (await answer.read()).endswith(b"[DONE]\n\n")
                assert len(broken.seen) == len(fleet.prefill[0].seen) == 1
                assert all(w.is_healthy for w in service.fleet.all_workers())

    asyncio.run(play())


def test_a_prefill_server_lost_after_the_first_token_no_longer_matters() -> None:
    async def play() -> None:
        async with bench(times=SLOW) as b:
            asked = asyncio.create_task(b.generate(4, 60))
            await asyncio.sleep(0.2)
            await b.fleet.prefill[0].die()
            status, data = await asked
            assert status == 200
            assert len(events(data)) == 60

    asyncio.run(play())


def test_without_any_server_the_answer_is_clear_and_it_recovers() -> None:
    async def play() -> None:
        async with bench(times=SLOW) as b:
            b.fleet.decode[0].is_frozen = True

            async def is_out() -> bool:
                return (await b.samples())[("voltana_healthy", "decode-0")] == 0

            await until(is_out)
            status, data = await b.generate()
            assert status == 503
            assert json.loads(data)["error"]["message"] == "no decode server answers: all 1 are out"
            async with b.client.get(b.url + "/health") as answer:
                assert answer.status == 503
            b.fleet.decode[0].is_frozen = False

            async def is_back() -> bool:
                return not await is_out()

            await until(is_back)
            assert (await b.generate())[0] == 200
            assert await settled(b, 2) == {
                "completed": 1, "failed": 1, "cancelled": 0, "rejected": 0
            }  # fmt: skip

    asyncio.run(play())


def test_a_frozen_server_is_found_and_others_are_served() -> None:
    """A stopped process keeps its connections open: only the health check tells. What it had may
    be why it stands still, so that no other server gets it."""

    async def play() -> None:
        async with bench(2, 1, times=SLOW) as b:
            b.fleet.prefill[0].is_frozen = True
            answers = await asyncio.gather(*(b.generate(4, 3) for _ in range(10)))
            assert Counter(status for status, _ in answers) == {200: 5, 502: 5}
            assert len(b.fleet.prefill[1].seen) == 5
            assert (await b.generate())[0] == 200
            assert (await settled(b, 11))["completed"] == 6

    asyncio.run(play())


def test_an_engines_own_failure_is_retried_before_and_told_after_the_first_token() -> None:
    async def play() -> None:
        async with bench(1, 2, times=SLOW) as b:
            b.fleet.decode[0].fail_next = [500]
            assert (await b.generate())[0] == 200
            b.fleet.decode[0].abort_after = b.fleet.decode[1].abort_after = 2
            status, data = await b.generate(4, 10)
            assert status == 200
            assert "KV transfer failed" in events(data)[-1]["error"]["message"]
            b.fleet.decode[0].fail_next = b.fleet.decode[1].fail_next = [400]
            assert (await b.generate())[0] == 400
            assert await settled(b, 3) == {
                "completed": 1, "failed": 1, "cancelled": 0, "rejected": 1
            }  # fmt: skip

    asyncio.run(play())


def test_500_streams_at_once_some_of_which_leave() -> None:
    async def play() -> None:
        async with bench(2, 2, times=StubTimes(decode_base_s=0.05), health_timeout_s=10.0) as b:

            async def stay() -> str:
                _, data = await b.generate(16, 10)
                assert len(events(data)) == 10
                return "completed"

            async def leave() -> str:
                async with b.client.post(b.url + "/generate", json=request_body(16, 1000)) as a:
                    await a.content.readany()
                    a.close()
                return "cancelled"

            ended = await asyncio.gather(*(leave() if i % 5 == 0 else stay() for i in range(500)))
            counts = await settled(b, 500)
            assert counts == {"failed": 0, "rejected": 0} | Counter(ended)

    asyncio.run(play())


def test_a_client_that_stops_reading_is_dropped() -> None:
    async def play() -> None:
        async with bench(client_stall_s=0.3, times=StubTimes(decode_base_s=0.0)) as b:
            host, port = b.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            body = json.dumps(request_body(4, 10**6)).encode()
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            await reader.read(10)
            counts = await settled(b, 1)
            assert counts["cancelled"] == 1
            writer.close()

    asyncio.run(play())


def test_a_client_that_never_ends_its_body_is_told() -> None:
    async def play() -> None:
        async with bench(client_stall_s=0.2) as b:
            host, port = b.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            await writer.drain()
            assert b" 408 " in await reader.readline()
            writer.close()
            assert (await settled(b, 1))["rejected"] == 1

    asyncio.run(play())


def test_a_request_that_ends_its_servers_does_not_end_the_fleet() -> None:
    """It is allowed two of four prefill servers, then it is given up; others are still served."""

    async def play() -> None:
        times = StubTimes(prefill_base_s=1.0)
        async with bench(4, 1, times=times, max_attempts=4, max_lost=2, health_period_s=0.05) as b:
            poison = asyncio.create_task(b.generate(4, 3))
            left, gone = list(b.fleet.prefill), []
            for _ in range(2):
                async with asyncio.timeout(10):
                    while not (hit := [server for server in left if server.seen]):
                        await asyncio.sleep(0.02)
                left.remove(hit[0])
                gone.append(f"prefill-{b.fleet.prefill.index(hit[0])}")
                await hit[0].die()
            status, data = await poison
            assert status == 502
            lost = " and ".join(sorted(gone))
            assert f"not tried again, {lost} were lost with it".encode() in data
            assert (await b.generate(4, 3))[0] == 200
            counts = await settled(b, 2)
            assert (counts["completed"], counts["failed"]) == (1, 1)

    asyncio.run(play())


def test_a_dead_router_is_a_connection_error_and_not_a_hang() -> None:
    async def play() -> None:
        async with bench() as b:
            url = b.url
        async with aiohttp.ClientSession() as client:
            with pytest.raises(aiohttp.ClientConnectorError):
                await client.post(url + "/generate", json=request_body(2, 2))

    asyncio.run(play())
