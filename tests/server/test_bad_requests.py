"""Input that is wrong, huge or hostile: a 4xx that names it, and a neighbour's text that stays what it is."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.hostile import NO_NUMBERS, NUMBERS
from tests.server.support import Running, error_of

PROMPT = {"prompt": "The list of", "max_tokens": 4}
USER = {"role": "user", "content": "x"}


def send(client: httpx.Client, raw: str | bytes, route: str = "/v1/completions") -> httpx.Response:
    content = raw.encode() if isinstance(raw, str) else raw
    return client.post(route, content=content, headers={"content-type": "application/json"})


def raw(**fields: str) -> str:
    """JSON of a completion request, fields as they are to be written."""
    written = {name: json.dumps(value) for name, value in PROMPT.items()} | fields
    return "{" + ",".join(f'"{name}":{value}' for name, value in written.items()) + "}"


@pytest.fixture(autouse=True)
def the_neighbour(request: pytest.FixtureRequest) -> Any:
    """Before and after each test a request of somebody else has the same text."""
    client = request.getfixturevalue("client")
    body = {"prompt": "import os", "max_tokens": 8, "temperature": 0}
    before = client.post("/v1/completions", json=body).json()["choices"]
    yield
    assert client.post("/v1/completions", json=body).json()["choices"] == before


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_of_a_field_is_refused_by_its_name(client: httpx.Client, name: str) -> None:
    huge = ("9" * 25, "1" + "0" * 400, "-" + "9" * 25)
    for value in (*NO_NUMBERS, *huge):
        error = error_of(send(client, raw(**{name: value})), 400)
        if error["param"] is not None:  # JSON itself knows no NaN in some places
            assert error["param"] == name
        assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, 2.1]),
        ("top_p", [0, -0.0, 1.1]),
        ("top_k", [-2, 1.5]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, -1, 5e-324, 1e-3, 101]),
        ("seed", [2**63, -(2**63) - 1, 0.5]),
        ("n", [0, -1, 129, 10**6]),
        ("best_of", [0, 129]),
        ("max_tokens", [0, -1, 1021, 2**31 - 1]),
        ("min_tokens", [-1, 5, 2**31 - 1]),
        ("logprobs", [-1, 21, 2**31 - 1]),
        ("priority", [0, 1]),
        ("truncate_prompt_tokens", [0, -1]),
    ],
)
def test_numbers_outside_of_their_range_are_refused(
    client: httpx.Client, name: str, values: list[Any]
) -> None:
    for value in values:
        error = error_of(client.post("/v1/completions", json=PROMPT | {name: value}), 400)
        assert name in error["message"] or error["param"] == name


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": -0.0},
        {"temperature": 1e-300},
        {"temperature": 2, "top_p": 1e-9},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 2**31 - 1},
        {"min_p": 1},
        {"repetition_penalty": 0.01},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"min_tokens": 4},
        {"logprobs": 20},
        {"n": 128},
        {"logit_bias": {"0": -100, "1023": 100}},
        {"stop": []},
        {"stop": None, "echo": None, "stream": None},
    ],
)
def test_the_ends_of_the_ranges_are_served(client: httpx.Client, options: dict[str, Any]) -> None:
    response = client.post("/v1/completions", json=PROMPT | options)
    assert response.status_code == 200, response.text
    assert json.loads(response.text, parse_constant=pytest.fail)  # no NaN or Infinity in what we say


def test_minimum_and_maximum_are_compared_after_defaults(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": "x", "min_tokens": 17}), 400)
    assert error["param"] == "min_tokens"
    body = {"messages": [USER], "min_tokens": 2000}
    assert error_of(client.post("/v1/chat/completions", json=body), 400)["param"] == "min_tokens"


@pytest.mark.parametrize("ids", [[-1], [1024], [2**31], [10**30], [1.5], ["1"], [True], [None], [[]], []])
@pytest.mark.parametrize("name", ["prompt", "stop_token_ids", "allowed_token_ids"])
def test_token_ids_must_be_the_models(client: httpx.Client, name: str, ids: list[Any]) -> None:
    if (name, ids) in (("stop_token_ids", []), ("prompt", ["1"])):  # nothing; a text
        return
    error = error_of(client.post("/v1/completions", json=PROMPT | {name: ids}), 400)
    assert error["param"] == name or error["param"].startswith(f"{name}[")


def test_lists_of_tokens_are_bounded(client: httpx.Client) -> None:
    million = [5] * 10**6
    assert error_of(client.post("/v1/completions", json=PROMPT | {"prompt": million}), 400)["code"] == (
        "context_length_exceeded"
    )
    for name in ("stop_token_ids", "allowed_token_ids"):
        assert error_of(client.post("/v1/completions", json=PROMPT | {name: million}), 400)["param"] == name
    bias = {str(i): 1 for i in range(2000)}
    assert (
        error_of(client.post("/v1/completions", json=PROMPT | {"logit_bias": bias}), 400)["param"]
        == "logit_bias"
    )


@pytest.mark.parametrize("key", ["-1", "1024", "x", "", "1.0", " 1", "1e3", "٣", "9" * 30, "0x1"])
def test_keys_of_the_bias_are_token_ids(client: httpx.Client, key: str) -> None:
    error = error_of(client.post("/v1/completions", json=PROMPT | {"logit_bias": {key: 1}}), 400)
    assert error["param"] == "logit_bias"


@pytest.mark.parametrize("value", ["101", "-101", "NaN", "true", '"1"', "null"])
def test_values_of_the_bias_are_bounded(client: httpx.Client, value: str) -> None:
    error = error_of(send(client, raw(logit_bias=f'{{"5":{value}}}')), 400)
    assert (error["param"] or "logit_bias").startswith("logit_bias")


def test_many_prompts_are_counted_before_anything_is_copied(client: httpx.Client) -> None:
    body = {"prompt": ["x"] * 1000, "n": 1000}
    assert "at most 128" in error_of(client.post("/v1/completions", json=body), 400)["message"]


def test_prompts_that_cannot_be(client: httpx.Client, tokenizer: Any) -> None:
    for prompt in ([], [[]], [""], [[1], []], {}, 5, True, [["a"]], [[1], "a"], None):
        body = PROMPT | {"prompt": prompt, "add_special_tokens": False}
        assert error_of(client.post("/v1/completions", json=body), 400)
    assert error_of(client.post("/v1/completions", json={}), 400)["param"] == "prompt"
    for messages in (
        [],
        None,
        [{}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": 5}],
        "x",
    ):
        assert error_of(client.post("/v1/chat/completions", json={"messages": messages}), 400)


def test_a_prompt_of_special_tokens_only_is_served(client: httpx.Client, tokenizer: Any) -> None:
    for token in tokenizer.all_special_ids:
        assert client.post("/v1/completions", json=PROMPT | {"prompt": [token]}).status_code == 200


def test_a_prompt_may_fill_the_model_but_for_one_token(client: httpx.Client) -> None:
    body = {"max_tokens": 1, "temperature": 0}
    assert client.post("/v1/completions", json=body | {"prompt": [5] * 1023}).status_code == 200
    for length in (1024, 1025):
        error = error_of(client.post("/v1/completions", json=body | {"prompt": [5] * length}), 400)
        assert error["code"] == "context_length_exceeded"
        assert "1024" in error["message"]
    long = "word " * 100_000
    assert error_of(client.post("/v1/completions", json=body | {"prompt": long}), 400)["code"]
    assert client.post(
        "/v1/completions", json=body | {"prompt": long, "truncate_prompt_tokens": 50}
    ).is_success


def test_a_conversation_of_ten_thousand_messages_is_too_long_not_too_slow(client: httpx.Client) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(10_000)]
    error = error_of(client.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stop", ["", ["x", ""], ["x"] * 17, "x" * 257, "x" * 100_000, 5, [5], {}])
def test_stop_strings_are_bounded(client: httpx.Client, stop: Any) -> None:
    error = error_of(client.post("/v1/completions", json=PROMPT | {"stop": stop}), 400)
    assert error["param"].startswith("stop")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "prompt"}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
        b"{'prompt': 'x'}",
        b'{"prompt": "x"} trailing',
    ],
)
def test_what_is_not_json_is_a_400(client: httpx.Client, body: bytes) -> None:
    error_of(send(client, body), 400)


def test_other_content_types_are_refused(client: httpx.Client) -> None:
    content = json.dumps(PROMPT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml", ""):
        response = client.post("/v1/completions", content=content, headers={"content-type": kind})
        error_of(response, 415)
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/completions", content=content, headers=headers).is_success


def test_unicode_of_every_kind_is_served(client: httpx.Client) -> None:
    for prompt in ("\x00\x01", "\u202e\ufeff", "🙂" * 20, "e\u0301", "\ufffd", "\U0010ffff"):
        assert client.post("/v1/completions", json=PROMPT | {"prompt": prompt}).status_code == 200


def test_a_body_is_bounded_announced_or_not(client: httpx.Client, server: Running) -> None:
    limit = server.state.config.max_body_bytes
    announced = send(client, b" " * (limit + 1))
    assert "bytes" in error_of(announced, 413)["message"]

    def endless() -> Any:
        for _ in range(limit // 65536 + 2):
            yield b" " * 65536

    headers = {"content-type": "application/json"}
    try:
        error_of(client.post("/v1/completions", content=endless(), headers=headers), 413)
    except httpx.WriteError:
        pass  # it was answered before all was sent
    headers |= {"content-length": "x"}
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(65536)


def test_a_huge_header_ends_its_connection_only(client: httpx.Client, server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 10_000_000)
            assert b" 400 " in connection.recv(65536)
        except ConnectionError:
            pass


def test_routes_and_methods_that_are_not_there(client: httpx.Client) -> None:
    error_of(client.get("/nothing"), 404)
    error_of(client.get("/v1/completions"), 405)
    error_of(client.get("/v1/models/nothing"), 404)
    error_of(client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/"}), 404)
    error_of(client.post("/v1/completions", json=PROMPT | {"model": "x" * 10_000}), 404)


@pytest.mark.parametrize("field", ["tools", "suffix", "prompt_logprobs", "guided_json", "foo.bar"])
def test_a_field_that_is_not_supported_is_named(client: httpx.Client, field: str) -> None:
    error = error_of(client.post("/v1/completions", json=PROMPT | {field: "x"}), 400)
    assert field in error["message"]


def test_fields_that_contradict_each_other(client: httpx.Client) -> None:
    for route, body, param in [
        ("/v1/completions", PROMPT | {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", PROMPT | {"echo": True, "logprobs": 1}, "echo"),
        ("/v1/completions", PROMPT | {"n": 3, "best_of": 2}, "best_of"),
        ("/v1/completions", PROMPT | {"min_tokens": 2, "allowed_token_ids": [0]}, "allowed_token_ids"),
        (
            "/v1/completions",
            PROMPT | {"min_tokens": 1, "allowed_token_ids": [5], "stop_token_ids": [5]},
            "allowed_token_ids",
        ),
        ("/v1/completions", PROMPT | {"n": 1, "best_of": 2, "stream": True}, "best_of"),
        ("/v1/chat/completions", {"messages": [USER], "top_logprobs": 1}, "top_logprobs"),
        (
            "/v1/chat/completions",
            {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 1},
            "max_completion_tokens",
        ),
    ]:
        assert error_of(client.post(route, json=body), 400)["param"] == param


def test_tokens_and_texts_are_checked_too(client: httpx.Client) -> None:
    assert client.post("/tokenize", json={"prompt": "a list"}).json()["count"] > 1
    rendered = client.post("/tokenize", json={"messages": [USER]}).json()["tokens"]
    assert "x" in client.post("/detokenize", json={"tokens": rendered}).json()["prompt"]
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for body in ({}, {"prompt": "x", "messages": [USER]}, {"prompt": 5}, {"prompt": "x", "model": 1}):
        error_of(client.post("/tokenize", json=body), 400)
    for tokens in ([-1], [1024], ["x"], None, [10**20]):
        error_of(client.post("/detokenize", json={"tokens": tokens}), 400)


def test_bad_and_good_requests_at_once_do_not_meet(client: httpx.Client) -> None:
    good = {"prompt": "class Shape", "max_tokens": 16, "temperature": 0}
    expected = client.post("/v1/completions", json=good).json()["choices"]
    bad = [
        {"temperature": 9},
        {"prompt": [2000]},
        {"n": 10**6},
        {"logit_bias": {"5000": 1}},
        {"max_tokens": 9999},
    ]

    def one(i: int) -> bool:
        if i % 2:
            return client.post("/v1/completions", json=good | bad[i % 5]).status_code == 400
        return client.post("/v1/completions", json=good).json()["choices"] == expected

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(60)))
