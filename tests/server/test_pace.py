"""Streams share the events that a server sends in a second; their texts are what they are without."""

from __future__ import annotations

import json
import time
from typing import Any

from hf_paged.server.pace import Pace
from tests.server.support import events, running
from tests.server.test_limits import LONG


def test_the_more_streams_the_longer_each_waits_up_to_a_limit() -> None:
    pace = Pace(100)
    assert pace.pause() == 0
    with pace.stream():
        assert pace.pause() == 0.01
        with pace.stream():
            assert pace.pause() == 0.02
        assert pace.pause() == 0.01
    assert pace.pause() == 0
    few = Pace(1000)
    with few.stream():
        assert few.pause() == 0  # not worth a timer
    many = Pace(1)
    with many.stream():
        assert many.pause() == 0.1


def test_tokens_that_came_meanwhile_share_an_event(llama: Any, tokenizer: Any) -> None:
    body = LONG | {"max_tokens": 300, "n": 2, "temperature": 1, "seed": 5}
    with running(llama, tokenizer, max_events_per_second=1) as server, server.client() as client:
        expected = [c["text"] for c in client.post("/v1/completions", json=body).json()["choices"]]
        began, waited = time.monotonic(), 0.0
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            parts = []
            for part in response.iter_text():
                parts.append(part)
                waited = waited or time.monotonic() - began
            *chunks, done = events("".join(parts))
        took = time.monotonic() - began
        assert done == "[DONE]"
        texts, ends = ["", ""], ["", ""]
        for chunk in chunks:
            choice = json.loads(chunk)["choices"][0]
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] += choice["finish_reason"] or ""
        assert texts == expected
        assert ends == ["length", "length"]
        assert len(chunks) <= 2 * (took / 0.1 + 3)
        assert waited < took
        server.wait_until_empty()
