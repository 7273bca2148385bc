"""/v1/chat/completions: the model's own template, and the forms that clients read."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.support import error_of, events

USER = {"role": "user", "content": "What is a list?"}
TURNS = [{"role": "system", "content": "Be short."}, USER]


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": [USER], "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks_of(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    body = {"messages": [USER], "temperature": 0, "stream": True} | body
    *chunks, done = events(client.post("/v1/chat/completions", json=body).text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    "messages", [[USER], TURNS, [*TURNS, {"role": "assistant", "content": "It is"}, USER]]
)
def test_the_prompt_is_what_the_template_makes_of_the_messages(
    client: httpx.Client, tokenizer: Any, messages: list[dict[str, str]]
) -> None:
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    expected = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 20, "temperature": 0}).json()
    answer = chat(client, messages=messages, max_tokens=20)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected["choices"][0]["text"]}
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")


def test_parts_of_text_are_joined(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " a list?"}]
    whole = chat(client, max_tokens=8)["choices"][0]["message"]
    assert (
        chat(client, messages=[{"role": "user", "content": parts}], max_tokens=8)["choices"][0]["message"]
        == whole
    )


def test_a_message_can_be_continued(client: httpx.Client, tokenizer: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "It is"}]
    with_end = chat(client, messages=messages, max_tokens=4)
    going_on = chat(
        client, messages=messages, max_tokens=4, continue_final_message=True, add_generation_prompt=False
    )
    assert going_on["usage"]["prompt_tokens"] < with_end["usage"]["prompt_tokens"]


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(client: httpx.Client) -> None:
    whole = chat(client, max_tokens=12)
    chunks = chunks_of(client, max_tokens=12, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    assert set(reasons[:-1]) == {None}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_every_choice_of_a_stream_is_whole(client: httpx.Client) -> None:
    body = {"max_tokens": 16, "n": 3, "seed": 3, "temperature": 1}
    whole = chat(client, **body)
    texts = ["", "", ""]
    for chunk in chunks_of(client, **body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_logprobs_have_tokens_bytes_and_alternatives(client: httpx.Client) -> None:
    choice = chat(client, max_tokens=6, logprobs=True, top_logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == choice["message"]["content"]
    for entry in content:
        assert [len(entry["top_logprobs"]), entry["top_logprobs"][0]["logprob"]] == [2, entry["logprob"]]
    assert (
        chat(client, max_tokens=2, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        == []
    )


def test_without_a_limit_the_answer_has_the_room_that_is_left(client: httpx.Client, tokenizer: Any) -> None:
    filler = " list" * 1000
    messages = [{"role": "user", "content": filler}]
    answer = chat(client, messages=messages, ignore_eos=True)
    limit = client.get("/v1/models").json()["data"][0]["max_model_len"]
    assert answer["usage"]["total_tokens"] == limit
    assert answer["choices"][0]["finish_reason"] == "length"


def test_what_chat_cannot_do_is_refused_by_name(client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    refused = {
        "tools": [tool],
        "tool_choice": "required",
        "functions": [{"name": "f"}],
        "modalities": ["audio"],
        "reasoning_effort": "low",
        "store": True,
        "chat_template": "{{ 1 }}",
        "chat_template_kwargs": {"tokenize": True},
        "prediction": {"type": "content", "content": "x"},
        "prompt_logprobs": 1,
        "nonsense": None,
    }
    for name, value in refused.items():
        error = error_of(client.post("/v1/chat/completions", json={"messages": [USER], name: value}), 400)
        assert error["param"] == name
        assert name in error["message"]


def test_what_asks_for_nothing_is_taken(client: httpx.Client) -> None:
    message = USER | {"tool_calls": None, "refusal": None, "audio": None}
    nothing = {"tools": [], "tool_choice": "none", "store": False, "metadata": None, "modalities": ["text"]}
    chat(client, messages=[message], max_tokens=1, **nothing, user="me", n=None, stop=None, logit_bias=None)
