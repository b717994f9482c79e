"""Requests that are none: refused before any server sees them, and counted."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hwreplay.router.test_router import bench, request_body, serving, until
from tests.hwreplay.router.test_router_faults import settled
from tests.hwreplay.stub_worker import MODEL, VOCAB_SIZE, stub_fleet
from voltana.hwreplay.router.body import PATHS, BadRequestError, parse_body
from voltana.hwreplay.router.errors import engine_error

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


@pytest.mark.parametrize("tell", ["the model's folder", "a name on a hub", "nothing"])
def test_token_ids_are_checked_by_what_the_servers_tell(tell: str) -> None:
    """The router is told nothing; without a size no id is let through, and a text still is."""

    async def play() -> None:
        async with bench(2, 1) as b:
            for worker in b.fleet.workers:
                worker.model = {"nothing": None, "a name on a hub": "org/name"}.get(tell, MODEL)
            for known in b.service.fleet.all_workers():
                b.service.fleet.take_out(known, "to be asked again")

            async def is_back() -> bool:
                return all(w.is_healthy for w in b.service.fleet.all_workers())

            await until(is_back)
            prompts: list[Any] = [[5, 99_999], [[5, 99_999]], [5, VOCAB_SIZE - 1]]
            statuses = []
            for prompt in [*prompts, [VOCAB_SIZE], [[VOCAB_SIZE]], "text"]:
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
                async with b.client.post(b.url + "/v1/completions", json=body) as answer:
                    statuses.append(answer.status)
                    if answer.status == 400:
                        error = (await answer.json())["error"]
                        assert error["type"] == "invalid_request_error"
                        assert error["code"] == 400
                        assert "token ids" in error["message"]
            is_told = tell == "the model's folder"
            assert statuses == [200 if is_told else 400] * 3 + [400, 400, 200]
            assert sum(len(w.seen) for w in b.fleet.prefill) == statuses.count(200)

    asyncio.run(play())


def test_a_server_with_another_vocabulary_narrows_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 512}}')

    async def play() -> None:
        async with stub_fleet() as fleet:
            fleet.decode[0].model = str(tmp_path)
            async with serving(fleet.table()) as (service, client, url):
                assert service.fleet.vocab_size == 512
                body = request_body(512, 1)
                async with client.post(url + "/generate", json=body) as answer:
                    assert answer.status == 400

    asyncio.run(play())


@pytest.mark.parametrize(
    "prompt", [[], [[]], [5, -1], [[-1]], [1.5], ["5"], [True], [None], [[1], [2]], [[[1]]], {}]
)
def test_a_prompt_that_is_no_row_of_token_ids_reaches_no_server(prompt: object) -> None:
    async def play() -> None:
        async with bench() as b:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
            async with b.client.post(b.url + "/v1/completions", json=body) as answer:
                if prompt == ["5"]:  # a list of one text is a prompt
                    assert answer.status == 200
                    return
                assert answer.status == 400
                assert (await answer.json())["error"]["type"] == "invalid_request_error"
            assert not any(w.seen for w in b.fleet.workers)

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
        body = parse_body(path, json.dumps(fields).encode(), 2**31)
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
            parse_body(path, data, 2**31)


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
