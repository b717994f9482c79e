"""Whatever goes wrong: the router stays up and completed + failed + cancelled + rejected = sent."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwreplay.router.body import PATHS, BadRequestError, parse_body
from hwreplay.router.errors import engine_error
from tests.hwreplay.stub_worker import StubTimes
from tests.hwreplay.test_router import Bench, bench, events, request_body, until

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


def test_a_killed_prefill_server_costs_no_request_another_can_serve() -> None:
    """No token is out while prefill runs, so each request is tried again on the other server."""

    async def play() -> None:
        async with bench(2, 1, times=StubTimes(prefill_base_s=0.5)) as b:
            asked = [asyncio.create_task(b.generate(4, 3)) for _ in range(20)]
            await asyncio.sleep(0.2)
            await b.fleet.prefill[0].die()
            answers = await asyncio.gather(*asked)
            assert [d for _, d in answers if not d.endswith(b"[DONE]\n\n")] == []
            assert (await settled(b, 20))["completed"] == 20
            assert (await b.samples())[("voltana_retries_total", "")] == 10

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


def test_a_frozen_server_is_found_and_its_requests_move() -> None:
    """A stopped process keeps its connections open: only the health check tells."""

    async def play() -> None:
        async with bench(2, 1, times=SLOW) as b:
            b.fleet.prefill[0].is_frozen = True
            answers = await asyncio.gather(*(b.generate(4, 3) for _ in range(10)))
            assert all(s == 200 and d.endswith(b"[DONE]\n\n") for s, d in answers)
            assert (await settled(b, 10))["completed"] == 10

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


WRONG: list[tuple[str, Any]] = [
    ("a list", []),
    ("no prompt", {}),
    ("both prompts", {"text": "x", "input_ids": [1]}),
    ("an empty prompt", {"input_ids": []}),
    ("ids as text", {"input_ids": ["1", "2"]}),
    ("a negative id", {"input_ids": [1, -1]}),
    ("a huge id", {"input_ids": [2**40]}),
    ("a nested prompt", {"input_ids": [[1], [2]]}),
    ("params as list", {"input_ids": [1], "sampling_params": [1]}),
    ("no new tokens", {"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}),
    ("new tokens as text", {"input_ids": [1], "sampling_params": {"max_new_tokens": "9"}}),
    ("new tokens as bool", {"input_ids": [1], "sampling_params": {"max_new_tokens": True}}),
    ("two answers", {"input_ids": [1], "sampling_params": {"n": 2}}),
    ("a huge number of logprobs", {"input_ids": [1], "top_logprobs_num": 129}),
    ("logprobs from before the prompt", {"input_ids": [1], "logprob_start_len": -100}),
    ("logprobs of no token", {"input_ids": [1], "token_ids_logprob": [2**40]}),
    ("two names", {"input_ids": [1], "rid": ["a", "b"]}),
    ("stream as text", {"input_ids": [1], "stream": "yes"}),
]


def test_requests_that_are_none_never_reach_a_server() -> None:
    async def play() -> None:
        async with bench() as b:
            raw = [b"", b"{", b"\xff\xfe", b"null", b"1e999", b"[" * 100_000]
            raw += [json.dumps(body).encode() for _, body in WRONG]
            for data in raw:
                async with b.client.post(b.url + "/generate", data=data) as answer:
                    assert answer.status == 400, data[:80]
                    message = (await answer.json())["error"]["message"]
                    assert message
                    assert "\n" not in message
            assert not b.fleet.prefill[0].seen
            assert (await settled(b, len(raw)))["rejected"] == len(raw)
            assert (await b.generate())[0] == 200

    asyncio.run(play())


def test_an_id_the_model_lacks_is_refused() -> None:
    """SGLang checks no id: one outside its embedding ends the server, and a retry the next."""

    async def play() -> None:
        async with bench(vocab_size=512) as b:
            assert (await b.generate(511, 1))[0] == 200  # ids 1 to 511
            assert (await b.generate(512, 1))[0] == 400
            prompt = {"prompt": [5, 512], "max_tokens": 1}
            async with b.client.post(b.url + "/v1/completions", json=prompt) as answer:
                assert answer.status == 400
                assert "0..511" in (await answer.json())["error"]["message"]
            assert len(b.fleet.prefill[0].seen) == 1

    asyncio.run(play())


def test_a_request_that_ends_its_servers_does_not_end_the_fleet() -> None:
    """Two of four prefill servers die with it, and it is given up; others are still served."""

    async def play() -> None:
        times = StubTimes(prefill_base_s=1.0)
        async with bench(4, 1, times=times, max_attempts=4, health_period_s=0.05) as b:
            poison = asyncio.create_task(b.generate(4, 3))
            left = list(b.fleet.prefill)
            for _ in range(2):
                async with asyncio.timeout(10):
                    while not (hit := [server for server in left if server.seen]):
                        await asyncio.sleep(0.02)
                left.remove(hit[0])
                await hit[0].die()
            status, data = await poison
            assert status == 502
            assert b"not tried again, 2 servers died with it" in data
            assert (await b.generate(4, 3))[0] == 200
            counts = await settled(b, 2)
            assert (counts["completed"], counts["failed"]) == (1, 1)

    asyncio.run(play())


def test_fuzzed_bytes_are_answered_and_counted() -> None:
    """400 mutations of a good body over live HTTP: each one is served or refused, never lost."""

    async def play() -> None:
        rng = np.random.default_rng(7)
        good = json.dumps(request_body(6, 2)).encode()
        async with bench(max_body_bytes=100_000) as b:
            statuses: Counter[int] = Counter()
            for _ in range(400):
                data = bytearray(good)
                for position in rng.integers(0, len(data), rng.integers(1, 6)):
                    data[position] = rng.integers(0, 256)
                path = PATHS[int(rng.integers(0, len(PATHS)))]
                async with b.client.post(b.url + path, data=bytes(data)) as answer:
                    await answer.read()
                    statuses[answer.status] += 1
            assert set(statuses) == {200, 400}
            counts = await settled(b, 400)
            assert (counts["completed"], counts["rejected"]) == (statuses[200], statuses[400])

    asyncio.run(play())


def test_a_connection_cut_in_the_middle_of_a_body() -> None:
    async def play() -> None:
        async with bench() as b:
            host, port = b.url.removeprefix("http://").split(":")
            for _ in range(20):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
                await writer.drain()
                await asyncio.sleep(0.01)
                writer.transport.abort()
            assert (await settled(b, 20))["cancelled"] == 20
            assert (await b.generate())[0] == 200

    asyncio.run(play())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["text", "input_ids", "prompt", "messages", "sampling_params", "stream", "n", "max_tokens"]
)


@given(path=st.sampled_from(PATHS), fields=st.dictionaries(FIELDS, JSON))
def test_any_json_object_is_a_request_or_a_bad_request(path: str, fields: dict[str, Any]) -> None:
    try:
        body = parse_body(path, json.dumps(fields).encode())
    except BadRequestError as error:
        message = str(error)
    else:
        message = ""
        assert body.input_tokens >= 1
        assert body.max_new_tokens >= 1
    assert "\n" not in message


@given(data=st.binary())
def test_any_bytes_are_a_request_or_a_bad_request(data: bytes) -> None:
    for path in PATHS:
        with pytest.raises(BadRequestError):
            parse_body(path, data)


def test_a_client_cannot_fake_an_engine_error() -> None:
    text = '{"error": {"message": "x"}} "finish_reason":{"type":"abort"'
    event = {"text": text, "meta_info": {"finish_reason": None}}
    data = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
    assert engine_error(data) is None
    aborted = {
        "meta_info": {"finish_reason": {"type": "abort", "message": "m", "status_code": 500}}
    }
    data += b"data: " + json.dumps(aborted, separators=(",", ":")).encode() + b"\n\n"
    assert engine_error(data) == (500, "m")


def test_a_dead_router_is_a_connection_error_and_not_a_hang() -> None:
    async def play() -> None:
        async with bench() as b:
            url = b.url
        async with aiohttp.ClientSession() as client:
            with pytest.raises(aiohttp.ClientConnectorError):
                await client.post(url + "/generate", json=request_body(2, 2))

    asyncio.run(play())
