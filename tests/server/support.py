"""A server on a free port of the loopback, in a thread, and what tests say to it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from hf_paged.server import ServerConfig, create_app
from hf_paged.server.serve import make_server
from hf_paged.server.state import ServerState


class Running:
    """A running server."""

    def __init__(self, app: Any, port: int) -> None:
        self.app = app
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def state(self) -> ServerState:
        return self.app.state.hf_paged

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def wait_until_empty(self, seconds: float = 5.0) -> None:
        """Returns when nothing is admitted and no block is in use; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.state.served.engine.stats()
            if not (
                self.state.runs.admission.sequences or stats.running or stats.waiting or stats.kv_blocks_used
            ):
                assert self.state.runs.admission.tokens == 0
                return
            time.sleep(0.005)
        raise AssertionError(f"still busy: {self.state.runs.admission.sequences} admitted, {stats}")


@contextmanager
def running(model: Any, tokenizer: Any, **config: Any) -> Iterator[Running]:
    """A server for `model`, which stays enabled after."""
    settings = ServerConfig(**config)
    app = create_app(model, tokenizer, settings)
    server = make_server(app, settings, port=0, log_level="critical")
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.005)
        yield Running(app, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


def events(text: str) -> list[str]:
    """The data of server-sent events, after a check of their form."""
    assert text.endswith("\n\n")
    parts = text.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, after a check that it has OpenAI's form and tells nothing of the inside."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    inside = re.search(r"Traceback|0x[0-9a-f]{6}|site-packages|\.py\b|/hf_paged|/home|/tmp", response.text)
    assert inside is None, inside
    return body["error"]
