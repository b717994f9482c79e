"""What OpenAI's clients ask beside requests: errors in JSON, one model, answers never dropped."""

from __future__ import annotations

import asyncio

from tests.hwreplay.router.test_router import bench
from tests.hwreplay.stub_worker import MODEL


def test_errors_are_json_and_a_model_has_an_entry() -> None:
    async def play() -> None:
        async with bench() as b:
            for method, path, status, word in (
                ("POST", "/v1/embeddings", 404, "/v1/chat/completions"),
                ("GET", "/v1/chat/completions", 405, "takes POST"),
                ("GET", "/v1/models/none", 404, MODEL),
            ):
                async with b.client.request(method, b.url + path) as answer:
                    assert answer.status == status
                    error = (await answer.json())["error"]
                    assert error["code"] == status
                    assert error["type"] == "invalid_request_error"
                    assert word in error["message"]
                    assert ("Allow" in answer.headers) == (status == 405)
            async with b.client.get(f"{b.url}/v1/models/{MODEL}") as answer:
                assert answer.status == 200
                assert (await answer.json())["id"] == MODEL
            assert not b.fleet.prefill[0].seen

    asyncio.run(play())


def test_more_answers_than_one_are_refused_by_name() -> None:
    async def play() -> None:
        async with bench() as b:
            for name in ("n", "best_of"):
                body = {"prompt": "hello", "max_tokens": 2, name: 2}
                async with b.client.post(b.url + "/v1/completions", json=body) as answer:
                    assert answer.status == 400
                    assert f"{name} must be 1" in (await answer.json())["error"]["message"]
            assert not b.fleet.prefill[0].seen
            body = {"prompt": "hello", "max_tokens": 2, "best_of": 1}
            async with b.client.post(b.url + "/v1/completions", json=body) as answer:
                assert answer.status == 200

    asyncio.run(play())
