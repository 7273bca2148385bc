"""Structured output: every text follows its grammar, and a hostile grammar hurts nobody."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.server.support import Running, error_of, events, running

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["list", "set"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
ASK = {"prompt": "An object:", "max_tokens": 900, "temperature": 1.0, "seed": 5}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


def texts(client: httpx.Client, **body: Any) -> list[str]:
    response = client.post("/v1/completions", json=ASK | body)
    assert response.status_code == 200, response.text
    assert all(choice["finish_reason"] == "stop" for choice in response.json()["choices"])
    return [choice["text"] for choice in response.json()["choices"]]


def check_thing(text: str) -> None:
    thing = json.loads(text)
    assert set(thing) == {"name", "size", "kind", "tags"}
    assert isinstance(thing["name"], str)
    assert len(thing["name"]) <= 8
    assert type(thing["size"]) is int
    assert 0 <= thing["size"] <= 99
    assert thing["kind"] in ("list", "set")
    assert all(type(tag) is bool for tag in thing["tags"])
    assert 1 <= len(thing["tags"]) <= 2


def test_texts_follow_a_schema_each_its_own_way(client: httpx.Client) -> None:
    found = texts(client, response_format=FORMAT, n=6)
    for text in found:
        check_thing(text)
    assert len(set(found)) > 1
    check_thing(texts(client, structured_outputs={"json": SCHEMA}, temperature=0)[0])
    check_thing(texts(client, structured_outputs={"json": json.dumps(SCHEMA)})[0])


def test_a_stream_follows_it_too(client: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": FORMAT,
        "seed": 2,
        "stream": True,
    }
    *chunks, _done = events(client.post("/v1/chat/completions", json=body | {"max_tokens": 900}).text)
    deltas = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    check_thing("".join(deltas))


def test_an_object_of_any_kind(client: httpx.Client) -> None:
    bias = {"logit_bias": {"0": 5}}
    for wanted in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        response = client.post("/v1/completions", json=ASK | wanted | bias | {"max_tokens": 400}).json()
        (choice,) = response["choices"]
        assert choice["text"].lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)


def test_choices_patterns_and_grammars(client: httpx.Client) -> None:
    choices = ['say "yes"', "no\n", "ünï 🙂", "back\\slash"]
    found = texts(client, structured_outputs={"choice": choices}, n=8, temperature=2)
    assert set(found) <= set(choices)
    assert len(set(found)) > 1
    (found_one,) = texts(client, structured_outputs={"regex": r"[a-c]{3}-\d{2}"})
    assert re.fullmatch(r"[a-c]{3}-\d{2}", found_one)
    (found_one,) = texts(client, structured_outputs={"grammar": 'root ::= "(" root ")" | "x"'}, temperature=0)
    assert re.fullmatch(r"\(*x\)*", found_one)
    assert found_one.count("(") == found_one.count(")")


def test_text_is_no_grammar(client: httpx.Client) -> None:
    plain = client.post("/v1/completions", json=ASK).json()["choices"]
    assert (
        client.post("/v1/completions", json=ASK | {"response_format": {"type": "text"}}).json()["choices"]
        == plain
    )


def test_neighbours_of_a_grammar_are_free(client: httpx.Client) -> None:
    body = {"prompt": "import os", "max_tokens": 24, "temperature": 0}
    alone = client.post("/v1/completions", json=body).json()["choices"]
    bound = threading.Thread(target=texts, args=(client,), kwargs={"response_format": FORMAT, "n": 4})
    bound.start()
    for _ in range(4):
        assert client.post("/v1/completions", json=body).json()["choices"] == alone
    bound.join()


def test_the_openai_client_parses(server: Running) -> None:
    class Thing(BaseModel):
        size: int
        round: bool

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as api:
        answer = api.chat.completions.parse(
            model="demo",
            messages=[{"role": "user", "content": "x"}],
            response_format=Thing,
            max_tokens=200,
            seed=1,
        )
    assert isinstance(answer.choices[0].message.parsed, Thing)


def schema(**part: Any) -> dict[str, Any]:
    return {"structured_outputs": {"json": part}}


@pytest.mark.parametrize(
    "wanted",
    [
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"regex": "a{2,1}"}},
        {"structured_outputs": {"grammar": "root ::= nothing"}},
        {"structured_outputs": {"grammar": "no grammar at all"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": [""]}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"json": "5"}},
        {"structured_outputs": {"json_object": False}},
        {"structured_outputs": {"structural_tag": "x"}},
        {"structured_outputs": {"regex": "a" * 70_000}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "grammar"}},
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        {"response_format": FORMAT, "structured_outputs": {"regex": "a"}},
        {"response_format": FORMAT, "min_tokens": 3},
        {"response_format": FORMAT, "ignore_eos": True},
        schema(type="nothing"),
        schema(type=["string", 5]),
        schema(type="string", pattern="("),
        schema(type="array", uniqueItems=True),
        schema(type="object", properties={"a": {"type": "number", "multipleOf": 3}}),
        schema(**{"$ref": "http://127.0.0.1/x.json"}),
        schema(**{"$ref": "file:///etc/passwd"}),
        schema(**{"$ref": "#/$defs/nothing"}),
    ],
)
def test_what_cannot_be_followed_is_refused(client: httpx.Client, wanted: dict[str, Any]) -> None:
    error = error_of(client.post("/v1/completions", json=ASK | wanted), 400)
    assert error["param"] is not None


def test_properties_may_be_named_like_keywords(client: httpx.Client) -> None:
    named = schema(type="object", properties={"not": {"type": "boolean"}}, required=["not"])
    assert set(json.loads(texts(client, **named)[0])) == {"not"}


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_served(llama: Any, tokenizer: Any) -> None:
    hostile = "((((a{1,500}){1,500}){1,500}){1,500}){1,500}"
    with running(llama, tokenizer, grammar_timeout=2.0) as server, server.client() as client:
        assert texts(client, structured_outputs={"choice": ["x"]}) == ["x"]
        first = server.state.grammars._process
        began = time.monotonic()
        response = client.post("/v1/completions", json=ASK | {"structured_outputs": {"regex": hostile}})
        error_of(response, 400)
        assert time.monotonic() - began < 30
        assert texts(client, structured_outputs={"choice": ["y"]}) == ["y"]
        assert client.get("/health").status_code == 200
        process = server.state.grammars._process
        assert process is not None
    assert process.poll() is not None, "the compiling process outlived its server"
    assert first is not None


def test_what_is_kept_is_bounded(llama: Any, tokenizer: Any) -> None:
    with running(llama, tokenizer, grammar_cache_bytes=1) as server, server.client() as client:
        for text in "abc":
            assert texts(client, structured_outputs={"choice": [text]}) == [text]
        assert len(server.state.grammars._kept) == 1
