"""What the parser of requests keeps of a client is bounded, and what is odd but right is answered."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hf_paged.server.serve import MAX_HEADER_BYTES
from tests.server.support import Running, running

BODY = json.dumps({"prompt": "The list of", "max_tokens": 4, "temperature": 0}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def server(llama: Any, tokenizer: Any) -> Iterator[Running]:
    with running(llama, tokenizer) as server:
        yield server


@contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def send_until_closed(connection: socket.socket, part: bytes, most: int) -> int:
    """Sends `part` again and again until the server has closed; how many bytes went out, at most `most`."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(part)
            sent += len(part)
            time.sleep(0.001)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


def test_headers_may_be_as_large_as_the_bound_says(server: Running) -> None:
    with connected(server) as connection:
        value = b"x" * (MAX_HEADER_BYTES - 1024)
        connection.sendall(GET + b"X-Long: " + value + b"\r\nConnection: close\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (GET, b"X-Field: y\r\n" * 512),
        (GET + b"X-Long: ", b"y" * 8192),
        (b"GET /", b"y" * 8192),
        (GET, b"y" * 8192),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X-Trailer: y\r\n" * 512),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Trailer: ", b"y" * 8192),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"y" * 8192),
        (b"", b"\r\n" * 4096),
        (b"", b"y" * 8192),
    ],
    ids=["fields", "value", "path", "name", "trailers", "trailer", "extension", "nothing", "garbage"],
)
def test_what_has_no_end_is_ended(server: Running, head: bytes, part: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(head)
        sent = send_until_closed(connection, part, 64 * MAX_HEADER_BYTES)
        # What lies in the sockets' buffers beyond the bound was never read.
        assert sent < 64 * MAX_HEADER_BYTES
    server.wait_until_empty()
    with server.client() as client:
        assert client.get("/health").is_success


def test_requests_sent_ahead_are_answered_one_by_one_in_their_order(server: Running) -> None:
    ask = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    with connected(server) as connection:
        connection.sendall(100 * ask + GET + b"Connection: close\r\n\r\n")
        answers = everything(connection)
    assert answers.count(b"HTTP/1.1 200 ") == 101
    assert answers.count(b'"finish_reason":"length"') == 100
    assert answers.rindex(b'"finish_reason"') < answers.rindex(b"HTTP/1.1 200 ")
    server.wait_until_empty()


def test_an_offer_to_speak_another_protocol_is_passed_over(server: Running) -> None:
    """As some HTTP/2 clients begin: the request is answered as it is, body and all."""
    offer = b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    with connected(server) as connection:
        connection.sendall(POST + offer + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"finish_reason":"length"' in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["lengths", "both", "negative", "encodings", "chunk", "space", "tls"],
)
def test_what_two_parsers_could_read_in_two_ways_is_refused(server: Running, request_bytes: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        assert b" 400 " in everything(connection).partition(b"\r\n")[0]
    server.wait_until_empty()
