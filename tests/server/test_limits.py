"""Overload, time, clients that go away or stall, and keys: what is taken is given back, at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from hf_paged.errors import ConfigError
from hf_paged.server import ServerConfig
from tests.server.support import Running, error_of, events, running

LONG = {"prompt": "The list of", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "import os", "max_tokens": 4, "temperature": 0}

#: A request of whose body one byte of a hundred comes.
HALF = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


def raw(body: dict[str, Any], route: str = "/v1/completions") -> bytes:
    """A request as it is sent."""
    content = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def start(server: Running, body: dict[str, Any], route: str = "/v1/completions") -> socket.socket:
    """Sends a request by hand; the connection is the caller's to close."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(raw(body, route))
    return connection


def narrow(server: Running) -> socket.socket:
    """A connection that takes next to nothing before somebody reads from it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", server.port))
    return connection


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


@pytest.fixture
def small(llama: Any, tokenizer: Any) -> Iterator[Running]:
    """A server with room for four sequences and 64 prompt tokens."""
    with running(llama, tokenizer, max_sequences=4, max_prompt_tokens=64) as server:
        yield server
        server.wait_until_empty()


def test_beyond_its_room_a_server_turns_away_and_recovers(small: Running) -> None:
    with small.client() as client:
        expected = client.post("/v1/completions", json=SHORT).json()["choices"]
        connections = [start(small, LONG) for _ in range(4)]
        wait_for(lambda: small.state.runs.admission.sequences == 4)
        refused = client.post("/v1/completions", json=SHORT)
        assert error_of(refused, 429)["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        assert small.state.runs.admission.refused == 1
        for connection in connections:
            connection.close()
        small.wait_until_empty()
        assert client.post("/v1/completions", json=SHORT).json()["choices"] == expected


def test_choices_and_prompt_tokens_count(small: Running) -> None:
    with small.client() as client:
        connection = start(small, LONG | {"n": 2})
        wait_for(lambda: small.state.runs.admission.sequences == 2)
        assert client.post("/v1/completions", json=SHORT | {"n": 2}).is_success
        error_of(client.post("/v1/completions", json=SHORT | {"n": 3}), 429)
        error_of(client.post("/v1/completions", json=SHORT | {"prompt": [5] * 60}), 429)
        connection.close()
        small.wait_until_empty()
        # Alone, a request that is larger than the room is served: it is bounded by itself.
        assert client.post("/v1/completions", json=SHORT | {"n": 6}).is_success


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("after", [0.0, 0.003, 0.01, 0.03, 0.1])
def test_a_client_that_goes_away_leaves_nothing(server: Running, stream: bool, n: int, after: float) -> None:
    for _ in range(3):
        connection = start(server, LONG | {"n": n, "stream": stream})
        time.sleep(after)
        connection.close()
        server.wait_until_empty(2)


def test_a_client_that_goes_away_while_it_waits_leaves_nothing(llama: Any, tokenizer: Any) -> None:
    """In the queue: the engine takes one sequence at a time."""
    import hf_paged
    from tests.helpers import demo_model

    model = demo_model("llama")
    hf_paged.enable(model, max_num_seqs=1, backend="reference")
    with running(model, tokenizer) as server:
        first = start(server, LONG)
        wait_for(lambda: hf_paged.stats(model).running == 1)
        others = [start(server, LONG | {"stream": bool(i % 2)}) for i in range(4)]
        wait_for(lambda: hf_paged.stats(model).waiting == 4)
        for connection in others:
            connection.close()
        wait_for(lambda: hf_paged.stats(model).waiting == 0)
        assert hf_paged.stats(model).running == 1
        first.close()
        server.wait_until_empty()
    hf_paged.disable(model)


def test_a_client_that_goes_away_in_its_body_leaves_nothing(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HALF)
        time.sleep(0.05)
    server.wait_until_empty()
    with server.client() as client:
        assert client.post("/v1/completions", json=SHORT).is_success


def test_a_request_that_takes_too_long_ends(llama: Any, tokenizer: Any) -> None:
    with running(llama, tokenizer, request_timeout=0.1) as server, server.client() as client:
        assert error_of(client.post("/v1/completions", json=LONG | {"n": 8}), 504)["code"] == "timeout"
        response = client.post("/v1/completions", json=LONG | {"n": 8, "stream": True})
        *_, last, done = events(response.text)
        assert json.loads(last)["error"]["code"] == "timeout"
        assert done == "[DONE]"
        server.wait_until_empty()
        failures = 'hf_paged:request_errors_total{model_name="model",status="504"} 2.0'
        assert failures in client.get("/metrics").text


def test_a_request_that_waits_too_long_is_turned_away(tokenizer: Any) -> None:
    import hf_paged
    from tests.helpers import demo_model

    model = demo_model("llama")
    hf_paged.enable(model, max_num_seqs=1)
    with running(model, tokenizer, queue_timeout=0.15) as server, server.client() as client:
        first = start(server, LONG)
        wait_for(lambda: hf_paged.stats(model).running == 1)
        refused = client.post("/v1/completions", json=SHORT)
        assert error_of(refused, 503)["code"] == "queue_timeout"
        assert refused.headers["retry-after"]
        first.close()
        server.wait_until_empty()
        assert client.post("/v1/completions", json=SHORT).is_success
    hf_paged.disable(model)


def test_a_body_that_does_not_come_is_not_waited_for(llama: Any, tokenizer: Any) -> None:
    with running(llama, tokenizer, body_timeout=0.1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HALF)
            connection.settimeout(5)
            assert b" 408 " in connection.recv(65536)


def test_a_reader_that_stalls_is_disconnected(llama: Any, tokenizer: Any) -> None:
    with running(llama, tokenizer, write_timeout=0.3) as server:
        connection = narrow(server)
        connection.sendall(raw(LONG | {"n": 32, "stream": True, "max_tokens": 400, "logprobs": 20}))
        wait_for(lambda: server.state.runs.admission.sequences == 32)
        wait_for(lambda: server.state.runs.admission.sequences == 0, 30)
        server.wait_until_empty()
        connection.close()
        with server.client() as client:
            assert client.post("/v1/completions", json=SHORT).is_success


def test_a_reader_that_stalls_before_its_stream_begins_holds_no_room(llama: Any, tokenizer: Any) -> None:
    """An answer that nobody takes, and behind it, on the same connection, a stream."""
    with running(llama, tokenizer, write_timeout=0.3) as server:
        connection = narrow(server)
        connection.sendall(raw(LONG | {"n": 32, "max_tokens": 400, "logprobs": 20}))
        connection.sendall(raw(LONG | {"stream": True, "max_tokens": 900}))
        wait_for(lambda: server.state.runs.admission.sequences == 32)
        wait_for(lambda: server.state.runs.admission.sequences == 1, 30)
        wait_for(lambda: server.state.runs.admission.sequences == 0, 5)
        server.wait_until_empty()
        connection.close()


def test_slow_readers_get_their_whole_text_and_hold_up_nobody(server: Running) -> None:
    connection = start(server, LONG | {"stream": True, "max_tokens": 60})
    connection.settimeout(5)
    with server.client() as client:
        assert client.post("/v1/completions", json=SHORT).is_success
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(256)
            time.sleep(0.001)
    connection.close()
    server.wait_until_empty()
    assert received.count(b'"text"') >= 10


KEY = "Bearer the-right-key"


@pytest.fixture(scope="module")
def locked(llama: Any, tokenizer: Any) -> Iterator[Running]:
    with running(llama, tokenizer, api_keys=("the-right-key", "another-key")) as server:
        yield server


ROUTES = (
    "/v1/models",
    "/v1/models/model",
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "/version",
    "/openapi.json",
    "/docs",
    "/nothing",
    "/",
    "//health",
    "/health/",
    "/v1//models",
    "/%76%31/models",
    "/health/../v1/models",
    "/Health",
)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_but_health_needs_a_key(locked: Running, route: str) -> None:
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
        with socket.create_connection(("127.0.0.1", locked.port)) as connection:
            connection.sendall(f"{method} {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert b" 401 " in connection.recv(65536).partition(b"\r\n")[0] + b" "


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer \x80",
        "Bearer wrong",
        "Basic the-right-key",
        "the-right-key",
        "Bearer the-right-key2",
        "Bearer the-right-ke",
        "Bearer THE-RIGHT-KEY",
        "Bearer the-right-key another-key",
    ],
)
def test_only_the_keys_themselves_open(locked: Running, header: str) -> None:
    with locked.client() as client:
        value = header.encode("latin-1")
        response = client.get("/v1/models", headers=[(b"authorization", value)])
        error = error_of(response, 401)
        assert "right" not in error["message"]
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_keys_open_and_health_is_open(locked: Running) -> None:
    with locked.client() as client:
        for key in ("the-right-key", "another-key"):
            for scheme in ("Bearer", "bearer"):
                assert client.get("/v1/models", headers={"authorization": f"{scheme} {key}"}).is_success
        two = [("authorization", KEY), ("authorization", "Bearer wrong")]
        error_of(client.get("/v1/models", headers=two), 401)
        assert client.get("/health").status_code == 200
        # The route is that of the request line, whatever the header says.
        error_of(client.get("/v1/models", headers={"host": "x/health?"}), 401)
        error_of(client.get("/v1/models", headers={"x-original-url": "/health"}), 401)


def test_a_websocket_is_refused(locked: Running) -> None:
    with locked.client() as client:
        headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        headers |= {"sec-websocket-key": "eA=="}
        assert client.get("/v1/completions", headers=headers).status_code in (400, 401, 403)


def test_prefixes_are_not_shared_between_keys(locked: Running) -> None:
    body = {
        "prompt": "A prompt of many words that only this test begins with, more than a block. " * 2,
        "max_tokens": 1,
    }

    def cached(key: str) -> int:
        with locked.client(headers={"authorization": f"Bearer {key}"}) as client:
            usage = client.post("/v1/completions", json=body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached("the-right-key") == 0
    assert cached("the-right-key") > 0
    assert cached("another-key") == 0


def test_no_page_of_another_origin_may_read(server: Running, llama: Any, tokenizer: Any) -> None:
    asking = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    with server.client() as client:
        assert not any("access-control" in name for name in client.get("/v1/models", headers=asking).headers)
    with running(llama, tokenizer, cors_origins=("https://app.example",), api_keys=("k",)) as open_server:
        with open_server.client() as client:
            answer = client.options("/v1/completions", headers=asking | {"origin": "https://app.example"})
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            refused = client.options("/v1/completions", headers=asking)
            assert "access-control-allow-origin" not in refused.headers


def test_priorities_only_where_they_are_allowed(llama: Any, tokenizer: Any) -> None:
    with running(llama, tokenizer, allow_priority=True) as server, server.client() as client:
        assert client.post("/v1/completions", json=SHORT | {"priority": -3}).is_success


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_sequences", 0),
        ("max_sequences", True),
        ("request_timeout", 0),
        ("request_timeout", float("nan")),
        ("request_timeout", None),
        ("queue_timeout", -1),
        ("model_names", ()),
        ("model_names", ["x"]),
        ("api_keys", ("",)),
        ("allow_priority", 1),
        ("max_model_len", 1),
    ],
)
def test_a_config_names_what_is_wrong(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**{name: value})


def test_a_key_is_in_no_error() -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(api_keys=("secret-key", ""))
    assert "secret-key" not in str(refused.value)


def test_many_clients_at_once_are_all_answered(server: Running) -> None:
    answers: list[httpx.Response] = []

    def one() -> None:
        with server.client() as client:
            answers.append(client.post("/v1/completions", json=SHORT))

    threads = [threading.Thread(target=one) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert len(answers) == 40
    server.wait_until_empty()
