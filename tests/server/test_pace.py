"""Streams share the events that a server sends in a second; their texts are what they are without."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from hf_paged.server.pace import Pace
from tests.server.support import events, running
from tests.server.test_limits import LONG


def test_the_more_streams_the_longer_each_waits_up_to_a_limit() -> None:
    pace = Pace(100)
    assert pace.seconds() == 0
    with pace.stream():
        assert pace.seconds() == 0.01
        with pace.stream():
            assert pace.seconds() == 0.02
        assert pace.seconds() == 0.01
    assert pace.seconds() == 0
    few = Pace(1000)
    with few.stream():
        assert few.seconds() == 0  # not worth a timer
    many = Pace(1)
    with many.stream():
        assert many.seconds() == 0.1


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_streams_go_on_together_and_one_that_leaves_disturbs_nobody(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def follow(pace: Pace) -> float:
        with pace.stream():
            await asyncio.sleep(0)  # until all are counted
            began = asyncio.get_running_loop().time()
            await pace.pause()
            return asyncio.get_running_loop().time() - began

    async def main() -> None:
        pace = Pace(1000)
        waited = await asyncio.gather(*(follow(pace) for _ in range(45)))
        assert min(waited) >= 0.045 - 0.011  # one of the two ticks around it
        assert not pace._ticks  # nothing is kept of those that are past
        pauses = [asyncio.ensure_future(follow(pace)) for _ in range(45)]
        await asyncio.sleep(0.002)
        assert 1 <= len(pace._ticks) <= 3
        pauses[0].cancel()
        left = await asyncio.gather(*pauses, return_exceptions=True)
        assert isinstance(left[0], asyncio.CancelledError)
        assert all(isinstance(seconds, float) for seconds in left[1:])
        assert pace.seconds() == 0

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("streams", [10, 13, 14, 15, 24, 50, 99])
def test_together_they_are_as_many_events_as_were_asked_for(
    streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that send again at the very tick they waited for."""

    class Clock:
        now = 1000.0
        time = staticmethod(lambda: Clock.now)
        call_at = staticmethod(lambda *_args: None)

    monkeypatch.setattr(asyncio, "get_running_loop", lambda: Clock)
    pace = Pace(1000)
    pace._streams = streams
    waited, count = 0.0, 4000
    for _ in range(count):
        pace._ticks.clear()
        pace._tick(pace.seconds())
        (number,) = pace._ticks
        waited += number * 0.01 - Clock.now
        Clock.now = number * 0.01 + 0.0005
    assert abs(waited / count + 0.0005 - streams / 1000) < 0.001


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
