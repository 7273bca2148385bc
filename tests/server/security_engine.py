"""Lines of `test_security.py` about what goes on behind requests: slots, faults, overload, ends, threads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch

import hf_paged
from hf_paged.engine.scheduler import Scheduler
from hf_paged.server.logits import OwnLogits
from tests.helpers import demo_model
from tests.server.security_world import ASK, SEEDED, World
from tests.server.support import error_of, running
from tests.server.test_limits import LONG, SHORT, start, wait_for


def slots(world: World) -> None:
    """Rows and blocks of requests that end at any moment go to others, who must not see it."""
    expected, seeded = world.text(), world.text(**SEEDED)
    chance = random.Random(1)

    def one(number: int) -> str | None:
        if number % 2:
            connection = start(world.server, LONG | {"n": 3, "stream": number % 4 == 1})
            time.sleep(chance.random() * 0.03)
            connection.close()
            return None
        with world.server.client() as client:
            body = ASK if number % 4 else SEEDED
            return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(one, range(60))) == {None, expected, seeded}


def disconnects(world: World) -> None:
    """Queued, in a long prompt, while decoding, after the last token; blocks are back within a step."""
    for body in (LONG, LONG | {"prompt": [7] * 900, "max_tokens": 60}, SHORT, LONG | {"n": 4, "best_of": 6}):
        for stream in (False, True) if "best_of" not in body else (False,):
            for phase in (0.0, 0.004, 0.03):
                steps = world.engine.stats().steps
                connection = start(world.server, body | {"stream": stream})
                time.sleep(phase)
                connection.close()
                world.server.wait_until_empty(3)
                assert world.engine.stats().steps - steps < 300  # far from the 900 tokens that were asked for


def faults(world: World) -> None:
    """What one request brings about is that request's error."""
    expected = world.text()

    def meanwhile(body: dict[str, Any], status: int) -> None:
        with ThreadPoolExecutor(4) as threads, world.server.client() as client:
            neighbours = [threads.submit(world.text) for _ in range(3)]
            error_of(client.post("/v1/completions", json=body), status)
            assert {n.result(30) for n in neighbours} == {expected}

    edit = OwnLogits.__call__
    with world.monkeypatch.context() as patched:
        patched.setattr(OwnLogits, "__call__", _raises(ValueError("secret at 0x7f0012345678")))
        meanwhile(ASK | {"logit_bias": {"5": 1}}, 500)
    with world.monkeypatch.context() as patched:

        def no_numbers(self: OwnLogits, generated: list[int], logits: torch.Tensor) -> None:
            edit(self, generated, logits)
            logits.fill_(float("nan"))

        patched.setattr(OwnLogits, "__call__", no_numbers)
        body = SEEDED | {"logit_bias": {"5": 1}}
        with world.server.client() as client:
            status = client.post("/v1/completions", json=body).status_code
        assert status in (400, 500)
        meanwhile(body, status)
    runner = world.engine._loop.runtime.runner
    with world.monkeypatch.context() as patched:
        patched.setattr(runner, "forward", _raises(torch.OutOfMemoryError("no memory")))
        error_of(world.client.post("/v1/completions", json=ASK), 500)
    assert world.text() == expected


def _raises(error: Exception) -> Callable[..., Any]:
    def function(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return function


def death(world: World) -> None:
    """The loop itself breaks: all are told, health says so, nothing is held, and it can be enabled again."""
    expected = world.text()
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(world.client.post, "/v1/completions", json=LONG) for _ in range(6)]
        wait_for(lambda: world.engine.stats().running == 6)
        with world.monkeypatch.context() as patched:
            patched.setattr(Scheduler, "schedule", _raises(RuntimeError("the loop is broken")))
            began = time.monotonic()
            assert all(answer.result(10).status_code in (500, 503) for answer in waiting)
            assert time.monotonic() - began < 5
            error_of(world.client.get("/health"), 503)
        assert world.client.get("/health").is_success
        assert world.text() == expected
        waiting = [threads.submit(world.client.post, "/v1/completions", json=LONG) for _ in range(6)]
        wait_for(lambda: world.engine.stats().running == 6)
        hf_paged.disable(world.model)
        assert all(error_of(answer.result(10), 503) for answer in waiting)
        error_of(world.client.get("/health"), 503)
    assert world.engine.stats().kv_bytes == 0
    with running(world.model, world.server.state.served.tokenizer) as again, again.client() as client:
        assert client.post("/v1/completions", json=ASK).json()["choices"][0]["text"] == expected


def overload(world: World) -> None:
    tokenizer = world.server.state.served.tokenizer
    with (
        running(world.model, tokenizer, max_sequences=4, max_prompt_tokens=64) as small,
        small.client() as client,
    ):
        expected = client.post("/v1/completions", json=ASK).json()["choices"]
        held = [start(small, LONG) for _ in range(4)]
        wait_for(lambda: small.state.runs.admission.sequences == 4)
        for body in (ASK, ASK | {"n": 2}, ASK | {"prompt": [5] * 60}):
            refused = client.post("/v1/completions", json=body)
            assert error_of(refused, 429)["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) >= 1
        assert 'request_errors_total{model_name="model",status="429"} 3.0' in client.get("/metrics").text
        for connection in held:
            connection.close()
        small.wait_until_empty()
        assert client.post("/v1/completions", json=ASK).json()["choices"] == expected


def shutdown(world: World) -> None:
    """Told to end while requests run: they end whole, new ones are turned away, no thread is left."""
    tokenizer = world.server.state.served.tokenizer
    before = {thread.name for thread in threading.enumerate()}
    with ThreadPoolExecutor(3) as threads, httpx.Client(timeout=60) as client:
        with running(world.model, tokenizer) as ending:
            url = f"{ending.url}/v1/completions"
            answers = [threads.submit(client.post, url, json=LONG | {"max_tokens": 300}) for _ in range(3)]
            wait_for(lambda: world.engine.stats().running == 3)
        assert [a.result(1).json()["usage"]["completion_tokens"] for a in answers] == [300] * 3
    with running(world.model, tokenizer, drain_timeout=1.0) as ending:
        slow = start(ending, LONG | {"n": 24, "stream": True})
        wait_for(lambda: world.engine.stats().running == 24)
    slow.close()
    wait_for(lambda: world.engine.stats().running == 0)
    wait_for(lambda: not any(t.name.startswith(("test-server", "hf_paged-server")) for t in _new(before)))


def _new(before: set[str]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name not in before]


def concurrency(world: World) -> None:
    """64 threads call `generate` on the model that is served, and training changes it between them."""
    ids = world.server.state.served.tokenizer("class Shape", return_tensors="pt")["input_ids"]
    configs: list[dict[str, Any]] = [
        {"do_sample": False, "max_new_tokens": 8},
        {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.3},
        {"num_beams": 2, "max_new_tokens": 6},
    ]
    alone = [world.model.generate(ids, **config)[0].tolist() for config in configs]
    expected = world.text()
    with ThreadPoolExecutor(72) as threads:
        calls = [threads.submit(world.model.generate, ids, **configs[i % 3]) for i in range(64)]
        asked = [threads.submit(world.text) for _ in range(8)]
        assert [call.result(120)[0].tolist() for call in calls] == [alone[i % 3] for i in range(64)]
        assert {answer.result(120) for answer in asked} == {expected}
    weight = world.model.lm_head.weight
    kept = weight.detach().clone()
    with hf_paged.paused(world.model):
        world.model.train()
        world.model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            weight -= 0.5 * weight.grad
        world.model.zero_grad()
        world.model.eval()
    assert world.text() != expected
    with hf_paged.paused(world.model), torch.no_grad():
        weight.copy_(kept)
    assert world.text() == expected


def preemption(world: World) -> None:
    """A pool of few blocks: every text is the one it has alone; what can never fit is refused at once."""
    tokenizer = world.server.state.served.tokenizer
    bodies = [ASK | {"prompt": [10 + i] * 20, "max_tokens": 120, "ignore_eos": True} for i in range(8)]
    alone = [world.text(**body) for body in bodies]
    model = demo_model("llama")
    hf_paged.enable(
        model, kv_cache_memory=40 * world.engine.stats().kv_bytes // world.engine.stats().kv_blocks_total
    )
    with running(model, tokenizer) as small, small.client() as client, ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda body: client.post("/v1/completions", json=body), bodies)
        assert [a.json()["choices"][0]["text"] for a in answers] == alone
        assert hf_paged.stats(model).preemptions > 0
        error = error_of(client.post("/v1/completions", json=ASK | {"prompt": [5] * 700}), 400)
        assert error["code"] == "context_length_exceeded"
        small.wait_until_empty()
    hf_paged.disable(model)


def determinism(world: World) -> None:
    """The same seed: alone, found in the prefix cache, and among others."""
    body = SEEDED | {"prompt": "A prompt of some blocks, for the cache. " * 4, "max_tokens": 40}
    alone = world.text(**body, cache_salt="nobody else's")
    assert [world.text(**body) for _ in range(2)] == [alone] * 2
    assert world.cached(**body) > 0
    with ThreadPoolExecutor(16) as threads:
        others = [threads.submit(world.text, seed=i, temperature=1.0) for i in range(12)]
        assert set(threads.map(lambda _: world.text(**body), range(4))) == {alone}
        assert len({other.result(60) for other in others}) > 1
    assert world.text(**body | {"seed": 8}) != alone
