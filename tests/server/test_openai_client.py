"""OpenAI's own client, as its users use it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.support import Running, running

MESSAGES: Any = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture
def api(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
        yield api
    server.wait_until_empty()


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["demo", "also-demo"]
    assert api.models.retrieve("demo").id == "demo"


def test_completions(api: openai.OpenAI) -> None:
    answer = api.completions.create(
        model="demo", prompt="The list of", max_tokens=8, temperature=0, n=2, logprobs=2, stop=["zzz"]
    )
    assert len(answer.choices) == 2
    assert answer.choices[0].text == answer.choices[1].text != ""
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 8
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_completions_as_a_stream(api: openai.OpenAI) -> None:
    whole = api.completions.create(model="demo", prompt="import", max_tokens=12, temperature=0)
    chunks = list(
        api.completions.create(
            model="demo",
            prompt="import",
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_chat(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="also-demo", messages=MESSAGES, max_completion_tokens=8, logprobs=True, top_logprobs=3, seed=1
    )
    assert answer.choices[0].message.content
    assert answer.model == "also-demo"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len((logprobs.content or [])[0].top_logprobs) == 3


def test_chat_as_a_stream(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=12, temperature=0)
    stream = api.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=12, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def test_the_asynchronous_client(server: Running) -> None:
    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as api:
            answers = await asyncio.gather(
                *(
                    api.completions.create(
                        model="demo", prompt=prompt, max_tokens=8, temperature=0, extra_body={"top_k": 5}
                    )
                    for prompt in ["a", "b", "a", "b"]
                )
            )
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(many())
    assert texts[:2] == texts[2:]


def test_each_error_has_its_class(api: openai.OpenAI, llama: Any, tokenizer: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(model="demo", prompt="x", temperature=5)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        api.completions.create(model="demo", prompt="x", max_tokens=100_000)
    assert too_long.value.code == "context_length_exceeded"
    with running(llama, tokenizer, model_names=("demo",), api_keys=("right",)) as server:
        options: Any = {"base_url": f"{server.url}/v1", "max_retries": 0}
        with openai.OpenAI(api_key="wrong", **options) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with openai.OpenAI(api_key="right", **options) as known:
            assert [model.id for model in known.models.list()] == ["demo"]
            with pytest.raises(openai.APITimeoutError):
                known.completions.create(
                    model="demo", prompt="x", max_tokens=900, extra_body={"ignore_eos": True}, timeout=0.05
                )
            server.wait_until_empty()


def test_a_full_queue_is_a_rate_limit_error_which_the_client_retries(llama: Any, tokenizer: Any) -> None:
    with running(llama, tokenizer, model_names=("demo",), max_sequences=1) as server:
        ticket = server.state.runs.admission.enter(1, 1)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
            with pytest.raises(openai.RateLimitError) as refused:
                api.completions.create(model="demo", prompt="x")
            assert refused.value.response.headers["retry-after"] == "1"
            ticket.release()
            assert api.completions.create(model="demo", prompt="x", max_tokens=1).choices
