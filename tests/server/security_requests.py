"""Lines of `test_security.py` about what clients send: numbers, ids, prompts, grammars, adapters, keys."""

from __future__ import annotations

import functools
import io
import json
import logging
import random
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hf_paged.engine import block_manager
from tests.server import hostile
from tests.server.security_world import ASK, JSON, World
from tests.server.support import error_of, running
from tests.server.test_adapters import save
from tests.server.test_limits import LONG, start, wait_for


def numbers(world: World) -> None:
    route = "/v1/completions"
    chance = random.Random(0)
    bodies = [hostile.raw(**{n: v}) for n in hostile.NUMBERS for v in chance.sample(hostile.NO_NUMBERS, 2)]
    world.all_refused([(route, body) for body in bodies])
    assert world.text(temperature=-0.0) == world.text()


def ranges(world: World) -> None:
    for name, values in hostile.OUTSIDE.items():
        for value in values:
            error = world.refused("/v1/completions", hostile.raw(**{name: json.dumps(value)}))
            assert name in (error["param"] or error["message"])


def token_ids(world: World) -> None:
    bodies = [hostile.raw(**{n: json.dumps(v)}) for n in hostile.TOKEN_LISTS for v in hostile.NO_TOKENS]
    bodies += [hostile.raw(logit_bias=json.dumps({key: 1})) for key in ("-1", "1024", "1.0", "9" * 30)]
    bodies += [hostile.raw(**{name: json.dumps([5] * 10**6)}) for name in hostile.TOKEN_LISTS]
    world.all_refused([("/v1/completions", body) for body in bodies])


def prompts(world: World) -> None:
    world.all_refused([("/v1/completions", body) for body in hostile.NO_JSON])
    most = world.server.state.served.max_len
    assert world.client.post("/v1/completions", json={"prompt": [5] * (most - 1), "max_tokens": 1}).is_success
    for prompt in ([5] * most, "x " * 100_000, [], ""):
        world.refused("/v1/completions", hostile.raw(prompt=json.dumps(prompt), add_special_tokens="false"))
    for token in world.server.state.served.tokenizer.all_special_ids:
        assert world.client.post("/v1/completions", json=ASK | {"prompt": [token]}).is_success
    chat = {"messages": [hostile.USER] * 10_000}
    assert world.refused("/v1/chat/completions", json.dumps(chat).encode())["code"]
    with socket.create_connection(("127.0.0.1", world.server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        assert b" 413 " in connection.recv(65536)
    error_of(world.client.post("/v1/completions", content=b"{}", headers={"content-type": "x/y"}), 415)
    try:
        assert world.client.get("/version", headers={"x": "a" * 2_000_000}).status_code == 400
    except httpx.TransportError:
        pass  # it was hung up on before all was sent


def copies(world: World) -> None:
    """Refused before the prompt is as much as tokenised."""
    with world.monkeypatch.context() as patched:
        patched.setattr(type(world.server.state.served), "encode", lambda *_a, **_k: pytest.fail("encoded"))
        for fields in (
            {"n": 10**6},
            {"best_of": 10**6},
            {"n": 2**31 - 1},
            {"prompt": ["x"] * 1000, "n": 100},
        ):
            world.refused("/v1/completions", json.dumps(ASK | fields).encode())
    assert world.server.state.runs.admission.sequences == 0


def stop_strings(world: World) -> None:
    whole = world.text()
    for at in range(1, len(whole) - 3, 5):
        stop = whole[at : at + 3]  # across whatever tokens there are
        assert world.text(stop=[stop, stop[:2] + "\x00"]) == whole[: whole.find(stop)]
    for pattern in (".*", "(a+)+$", "[", "\\"):
        assert pattern in whole or world.text(stop=pattern) == whole
    world.refused("/v1/completions", json.dumps(ASK | {"stop": "x" * 100_000}).encode())


def grammars(world: World) -> None:
    def body(wanted: dict[str, Any]) -> bytes:
        return json.dumps(ASK | {"structured_outputs": wanted}).encode()

    world.all_refused([("/v1/completions", body(wanted)) for wanted in hostile.NO_GRAMMARS])
    began = time.monotonic()
    nested = functools.reduce(lambda inner, _: f"({inner}){{1,500}}", range(9), "a")
    world.refused("/v1/completions", body({"regex": nested}))
    assert time.monotonic() - began < 30
    recursive = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    response = world.client.post("/v1/completions", content=body({"json": recursive}), headers=JSON)
    assert response.status_code == 200, response.text
    forced = {"structured_outputs": {"choice": ["a🙂b"]}, "max_tokens": 30}
    assert world.text(**forced) == "a🙂b"
    assert world.text(**forced, stop="🙂") == "a"  # a character of several tokens
    for i in range(6):
        assert world.text(structured_outputs={"choice": [f"kept-{i}"]}) == f"kept-{i}"
    assert len(world.server.state.grammars._kept) < 6


def templates(world: World) -> None:
    for template in hostile.TEMPLATES:
        chat = {"messages": [hostile.USER]} | template
        for route in ("/v1/chat/completions", "/tokenize"):
            error = world.refused(route, json.dumps(chat).encode())
            assert error["param"] == next(iter(template))


def adapters(world: World) -> None:
    root = world.server.state.config.adapter_root
    assert root is not None
    save(root / "good", 1)
    save(root / "good2", 2)
    save(root / "wide", 3, rank=64)
    save(root / "other", 4, hidden_from="gpt2")
    outside = save(world.tmp_path / "outside", 5)
    (root / "link").symlink_to(outside)
    (root / "pickle").mkdir()
    (root / "pickle" / "adapter_config.json").write_bytes((root / "good/adapter_config.json").read_bytes())
    torch.save({}, root / "pickle" / "adapter_model.bin")

    def load(path: str, name: str = "mine", **more: Any) -> httpx.Response:
        return world.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | more)

    for path in (*hostile.NAMES, "link", "wide", "other", "pickle", ".."):
        error_of(load(path), 400)
    for folder in (
        outside,
        root / "good",
    ):  # what the client wrote is in the error, so that names no file of ours
        assert load(str(folder)).status_code == 400
    assert load("good").is_success
    long = {"prompt": "a prompt of several blocks " * 8, "model": "mine"}
    first = world.text(**long)
    assert world.cached(**long) > 0
    assert load("good2", load_inplace=True).is_success
    assert world.cached(**long) == 0
    assert world.text(**long) != first
    most = world.server.state.config.max_adapters
    loaded = [load("good", f"a{i}").status_code for i in range(most + 3)]
    assert loaded == [200] * (most - 1) + [400] * 4
    running_one = start(world.server, LONG | {"model": "mine", "max_tokens": 100})
    wait_for(lambda: world.engine.stats().running == 1)
    assert world.client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).is_success
    assert b" 200 " in running_one.recv(65536)
    running_one.close()
    error_of(world.client.post("/v1/completions", json=ASK | {"model": "mine"}), 404)


def prefixes(world: World) -> None:
    long = {"prompt": "one more prompt of several blocks " * 8}
    assert [world.cached(**long) > 0 for _ in range(2)] == [False, True]
    assert world.cached(**long, cache_salt="mine") == 0
    assert world.cached(**long, cache_salt="yours") == 0
    assert world.cached(**long, cache_salt="mine") > 0
    before = world.text(**long)
    with torch.no_grad():
        world.model.model.embed_tokens.weight.mul_(1.5)
    assert world.cached(**long) == 0
    assert world.text(**long) != before
    # Python's hash() can be steered: keys of blocks are digests.
    assert "hashlib" in Path(block_manager.__file__).read_text()
    with torch.no_grad():
        world.model.model.embed_tokens.weight.div_(1.5)


def keys(world: World) -> None:
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    world.monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    world.monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    with running(world.model, world.server.state.served.tokenizer, api_keys=("the-key",)) as locked:
        with locked.client() as client:
            for path in (
                "/v1/models",
                "//v1/models",
                "/%76%31/models",
                "/metrics",
                "/tokenize",
                "/x",
                "/health/",
            ):
                for method in ("GET", "POST", "HEAD", "OPTIONS"):
                    host = {"host": "x/health?", "x-original-url": "/health"}
                    assert client.request(method, path, headers=host).status_code == 401
            assert client.get("/v1/models", headers={"authorization": "Bearer the-key"}).is_success
            assert client.get("/health").is_success
    assert "the-key" not in logged.getvalue()


def error_bodies(world: World) -> None:
    """Each status has OpenAI's form, tells nothing of the inside, and says when to come back where that helps."""
    post, long = world.client.post, [5] * 5000
    answers = [
        (post("/v1/completions", json=ASK | {"temperature": 9}), 400, "invalid_request_error"),
        (post("/v1/completions", json=ASK | {"prompt": long}), 400, "invalid_request_error"),
        (post("/v1/completions", json=ASK | {"model": "nobody"}), 404, "not_found_error"),
        (world.client.get("/nothing"), 404, "not_found_error"),
        (world.client.delete("/v1/completions"), 405, "invalid_request_error"),
        (post("/v1/completions", content=b" " * (2**23 + 1)), 413, "invalid_request_error"),
        (
            post("/v1/completions", content=b"x", headers={"content-type": "text/plain"}),
            415,
            "invalid_request_error",
        ),
    ]
    model, tokenizer = world.model, world.server.state.served.tokenizer
    with running(model, tokenizer, api_keys=("k",)) as locked, locked.client() as client:
        answers.append((client.get("/v1/models"), 401, "authentication_error"))
    limits: dict[str, Any] = {"body_timeout": 0.1, "request_timeout": 0.1, "max_sequences": 2}
    with running(model, tokenizer, **limits) as hasty, hasty.client() as client:
        answers.append((client.post("/v1/completions", json=LONG), 504, "timeout_error"))
        ticket = hasty.state.runs.admission.enter(2, 2)
        answers.append((client.post("/v1/completions", json=ASK), 429, "rate_limit_error"))
        ticket.release()
    world.monkeypatch.setattr(type(world.server.state), "trouble", _broken)
    answers.append((world.client.get("/health"), 503, "service_unavailable_error"))
    world.monkeypatch.undo()
    for response, status, kind in answers:
        assert error_of(response, status)["type"] == kind
        assert ("retry-after" in response.headers) == (status in (429, 503))


async def _broken(_state: Any) -> str:
    return "the engine is broken"
