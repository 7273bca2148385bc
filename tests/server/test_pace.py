"""Streams share the events that a server sends in a second; their texts are what they are without."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

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


def test_streams_go_on_together_and_none_of_them_later_than_it_should() -> None:
    async def follow(pace: Pace, ended: list[float]) -> float:
        with pace.stream():
            await asyncio.sleep(0)  # until all are counted
            began = asyncio.get_running_loop().time()
            await pace.pause()
            ended.append(asyncio.get_running_loop().time())
            return ended[-1] - began

    async def main() -> None:
        pace, ended = Pace(1000), list[float]()
        waited = await asyncio.gather(*(follow(pace, ended) for _ in range(40)))
        assert min(waited) >= 0.04 - 0.01  # a tick is the nearest one
        assert max(waited) - min(waited) < 0.01  # all of one moment share theirs
        assert not pace._ticks  # and nothing is kept of it

        # One that goes away takes nobody else's tick away.
        pause = [asyncio.ensure_future(follow(pace, ended)) for _ in range(40)]
        await asyncio.sleep(0.001)
        pause[0].cancel()
        left = await asyncio.gather(*pause, return_exceptions=True)
        assert isinstance(left[0], asyncio.CancelledError)
        assert all(isinstance(seconds, float) for seconds in left[1:])

    asyncio.run(main())


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
