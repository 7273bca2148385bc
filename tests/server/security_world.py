"""What a line of `test_security.py` works with."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.server.support import Running, error_of

ASK: dict[str, Any] = {"prompt": "class Shape", "max_tokens": 24, "temperature": 0}
SEEDED: dict[str, Any] = {"prompt": "An object that", "max_tokens": 24, "seed": 7, "temperature": 1.0}
JSON = {"content-type": "application/json"}


class World:
    """A server of the line's own, with a neighbour who asks while the line does its worst."""

    def __init__(self, server: Running, client: httpx.Client, monkeypatch: Any, tmp_path: Path) -> None:
        self.server, self.client, self.monkeypatch, self.tmp_path = server, client, monkeypatch, tmp_path
        self.engine = server.state.served.engine
        self.model = server.state.served.inner

    def text(self, **body: Any) -> str:
        response = self.client.post("/v1/completions", json=ASK | body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def cached(self, **body: Any) -> int:
        usage = self.client.post("/v1/completions", json=ASK | body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    def refused(self, route: str, body: bytes) -> dict[str, Any]:
        response = self.client.post(route, content=body, headers={"content-type": "application/json"})
        return error_of(response, 404 if b'"model"' in body else 400)

    def all_refused(self, bodies: list[tuple[str, bytes]]) -> None:
        """Sends `bodies` while two neighbours ask, whose texts must be right."""
        expected = self.text()
        with ThreadPoolExecutor(2) as threads:
            over = threading.Event()

            def neighbour() -> set[str]:
                texts = set()
                with self.server.client() as client:
                    while not texts or not over.is_set():
                        texts.add(client.post("/v1/completions", json=ASK).json()["choices"][0]["text"])
                return texts

            neighbours = [threads.submit(neighbour) for _ in range(2)]
            try:
                for route, body in bodies:
                    assert len(self.refused(route, body)["message"]) < 500
            finally:
                over.set()
            assert [n.result(60) for n in neighbours] == [{expected}] * 2
