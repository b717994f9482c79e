"""The official OpenAI client against the router: what it asks, reads, refuses and breaks off."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.hwreplay.router.test_router import Bench, bench
from tests.hwreplay.stub_worker import MODEL, StubTimes

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "hello"},
]


def client_of(b: Bench, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{b.url}/v1", api_key=key, max_retries=0)


def test_it_reads_answers_streams_and_models() -> None:
    async def play() -> None:
        async with bench(2, 2) as b, client_of(b) as client:
            assert [model.id for model in (await client.models.list()).data] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            chat = await client.chat.completions.create(
                model="m", messages=MESSAGES, max_completion_tokens=3, n=1, stop=["\n"],
                logprobs=True, top_logprobs=2,
            )  # fmt: skip
            assert chat.choices[0].message.content == "xxx"
            assert chat.choices[0].finish_reason == "length"
            assert chat.choices[0].logprobs is not None
            assert [t.logprob for t in chat.choices[0].logprobs.content or ()] == [-0.5] * 3
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 3
            plain = await client.completions.create(
                model="m", prompt="hello", max_tokens=4, stop="\n", logprobs=1, seed=7
            )
            assert plain.choices[0].text == "xxxx"
            assert plain.choices[0].logprobs is not None
            assert plain.choices[0].logprobs.token_logprobs == [-0.5] * 4
            pieces = [
                piece.choices[0].delta.content
                async for piece in await client.chat.completions.create(
                    model="m", messages=MESSAGES, max_tokens=5, stream=True,
                    stream_options={"include_usage": True},
                )
            ]  # fmt: skip
            assert pieces == ["x"] * 5
            texts = [
                piece.choices[0].text
                async for piece in await client.completions.create(
                    model="m", prompt=["hello"], max_tokens=6, stream=True
                )
            ]
            assert texts == ["x"] * 6
            # what the router has no use for reaches both servers of the pair as it came
            asked = {body["max_tokens"]: body for w in b.fleet.decode for body in w.seen
                     if "max_tokens" in body}  # fmt: skip
            assert (asked[4]["stop"], asked[4]["logprobs"], asked[4]["seed"]) == ("\n", 1, 7)
            assert asked[5]["stream_options"] == {"include_usage": True}
            assert len([x for w in b.fleet.prefill for x in w.seen]) == 4

    asyncio.run(play())


def test_it_reads_refusals_as_its_own_errors() -> None:
    async def play() -> None:
        async with bench(token="secret") as b:
            async with client_of(b, "wrong") as stranger:
                with pytest.raises(openai.AuthenticationError, match="Bearer TOKEN"):
                    await stranger.completions.create(model="m", prompt="hello")
            async with client_of(b, "secret") as client:
                with pytest.raises(openai.BadRequestError, match="n must be 1") as caught:
                    await client.chat.completions.create(model="m", messages=MESSAGES, n=2)
                assert caught.value.type == "invalid_request_error"
                with pytest.raises(openai.BadRequestError, match="one prompt"):
                    await client.completions.create(model="m", prompt=["a", "b"])
                with pytest.raises(openai.BadRequestError, match="best_of must be 1"):
                    await client.completions.create(model="m", prompt="a", best_of=2)
                with pytest.raises(openai.NotFoundError, match="no model 'none' is served"):
                    await client.models.retrieve("none")
                with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
                    await client.embeddings.create(model="m", input="hello")
                with pytest.raises(openai.NotFoundError, match="/v1/responses"):
                    await client.responses.create(model="m", input="hello")
                b.fleet.decode[0].abort_after = 2
                stream = await client.completions.create(
                    model="m", prompt="hello", max_tokens=5, stream=True
                )
                with pytest.raises(openai.APIError, match="KV transfer failed"):
                    _ = [piece async for piece in stream]

    asyncio.run(play())


def test_a_stream_that_it_breaks_off_ends_at_the_server() -> None:
    async def play() -> None:
        async with bench(times=StubTimes(decode_base_s=0.01)) as b, client_of(b) as client:
            stream = await client.chat.completions.create(
                model="m", messages=MESSAGES, max_tokens=2000, stream=True
            )
            async for _ in stream:
                break
            await stream.close()
            async with asyncio.timeout(60):
                while not b.fleet.decode[0].cancelled:
                    await asyncio.sleep(0.01)
            again = await client.completions.create(model="m", prompt="hello", max_tokens=2)
            assert again.choices[0].text == "xx"

    asyncio.run(play())
