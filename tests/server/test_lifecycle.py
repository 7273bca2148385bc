"""An engine that fails, a server that is told to end, and what is left: nothing."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import hf_paged
from tests.helpers import DEMO_MODELS, ROOT, demo_model
from tests.server.support import Running, error_of, events, running
from tests.server.test_limits import LONG, SHORT, start, wait_for


@pytest.fixture
def own(tokenizer: Any) -> Iterator[Running]:
    """A server whose engine may break."""
    model = demo_model("llama")
    with running(model, tokenizer) as server:
        yield server
    hf_paged.disable(model)


def test_a_forward_that_fails_is_told_at_once_and_seen_by_health(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = type(own.state.served.inner.model.layers[0].mlp)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret of the inside at 0x7f0012345678")

    with own.client() as client, ThreadPoolExecutor(8) as threads:
        assert client.get("/health").status_code == 200
        waiting = [threads.submit(client.post, "/v1/completions", json=LONG) for _ in range(6)]
        stream = threads.submit(client.post, "/v1/completions", json=LONG | {"stream": True})
        wait_for(lambda: own.state.served.engine.stats().running == 7)
        with monkeypatch.context() as patched:
            patched.setattr(mlp, "forward", broken)
            for answer in waiting:
                error_of(answer.result(10), 500)
            *_, last, done = events(stream.result(10).text)
            assert json.loads(last)["error"]["type"] == "server_error"
            assert "secret" not in last
            assert done == "[DONE]"
            health = client.get("/health")
            assert error_of(health, 503)["code"] == "engine_unavailable"
            assert health.headers["retry-after"]
            error_of(client.post("/v1/completions", json=SHORT), 500)
        # It works again: health finds out by itself, with a trial request.
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=SHORT).is_success
        own.wait_until_empty()


def test_a_model_that_is_disabled_is_unavailable(own: Running) -> None:
    with own.client() as client, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.post, "/v1/completions", json=LONG)
        wait_for(lambda: own.state.served.engine.stats().running == 1)
        hf_paged.disable(own.state.served.inner)
        error_of(waiting.result(10), 503)
        error_of(client.get("/health"), 503)
        error_of(client.post("/v1/completions", json=SHORT), 503)
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 200


def test_a_step_that_hangs_is_seen_by_health(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = type(own.state.served.inner.model.layers[0].mlp)
    forward, go_on = mlp.forward, threading.Event()

    def hanging(*args: Any) -> Any:
        go_on.wait(20)
        return forward(*args)

    object.__setattr__(own.state.config, "stalled_after", 0.05)
    with own.client() as client, ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(mlp, "forward", hanging)
        waiting = threads.submit(client.post, "/v1/completions", json=SHORT)
        wait_for(lambda: client.get("/health").status_code == 503)
        go_on.set()
        assert waiting.result(10).is_success
        assert client.get("/health").status_code == 200


def test_apps_leave_no_thread_and_no_file(tokenizer: Any) -> None:
    model = demo_model("llama")

    def resources() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once() -> None:
        with running(model, tokenizer) as server, server.client() as client:
            assert client.post("/v1/completions", json=SHORT).is_success
            assert client.post("/v1/completions", json=SHORT | {"stream": True}).is_success

    once()
    wait_for(lambda: not any(t.name == "hf_paged-engine" for t in threading.enumerate()))
    before = resources()
    for _ in range(3):
        once()
    wait_for(lambda: resources() <= before)
    hf_paged.disable(model)


def test_the_app_can_be_a_part_of_ones_own(own: Running, tokenizer: Any) -> None:
    import asyncio

    from fastapi import FastAPI

    from hf_paged.server import create_app

    outer = FastAPI()
    outer.mount("/llm", create_app(own.state.served.inner, tokenizer, model_names=("mine",)))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=outer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/llm/v1/completions", json=SHORT)

    answer = asyncio.run(ask())
    assert answer.is_success
    assert answer.json()["model"] == "mine"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`hf-paged serve` in a process of its own, ready."""
    port = free_port()
    keys = tmp_path / "keys"
    keys.write_text("# for the tests\nthe-key\n")
    command = [sys.executable, "-m", "hf_paged", "serve", str(DEMO_MODELS / "llama"), "--port", str(port)]
    command += ["--model-name", "demo", "--api-key-file", str(keys), "--drain-timeout", "20"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.communicate()


def test_the_first_signal_drains_and_the_process_ends_well(
    process: tuple[subprocess.Popen[str], int],
) -> None:
    running_process, port = process
    url, headers = f"http://127.0.0.1:{port}", {"authorization": "Bearer the-key"}
    assert httpx.post(f"{url}/v1/completions", json=SHORT).status_code == 401
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=LONG | {"stream": True}, headers=headers
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        running_process.send_signal(signal.SIGTERM)
        received = list(lines)
    assert received[-2] == "data: [DONE]"
    assert json.loads(received[-4][6:])["choices"][0]["finish_reason"] == "length"
    output, _ = running_process.communicate(timeout=20)
    assert running_process.returncode == 0, output
    assert "Traceback" not in output
    assert "the-key" not in output
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_second_signal_does_not_wait(process: tuple[subprocess.Popen[str], int]) -> None:
    running_process, port = process
    headers = {"authorization": "Bearer the-key"}
    body = LONG | {"stream": True, "n": 100}
    with httpx.stream(
        "POST", f"http://127.0.0.1:{port}/v1/completions", json=body, headers=headers
    ) as stream:
        lines = stream.iter_lines()  # kept: dropped, it would close the connection
        next(lines)
        running_process.send_signal(signal.SIGTERM)
        assert running_process.stdout is not None
        told = ""
        while "Waiting for connections" not in told:
            line = running_process.stdout.readline()
            told += line
            assert line, f"it ended by itself: {told}"
        began = time.monotonic()
        running_process.send_signal(signal.SIGTERM)
        running_process.wait(15)
        assert time.monotonic() - began < 10
    assert running_process.returncode == 0


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["/no/such/folder"], "config.json"),
        ([str(DEMO_MODELS / "llama"), "--max-model-len", "5000"], "max_model_len"),
        ([str(DEMO_MODELS / "llama"), "--api-key-file", "/no/such/file"], "--api-key-file"),
        ([str(DEMO_MODELS / "llama"), "--request-timeout", "0"], "request_timeout"),
        ([str(DEMO_MODELS / "llama"), "--adapter", "x"], "--adapter"),
        (["random:llama-tiny"], "tokenizer"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], told: str) -> None:
    from typer.testing import CliRunner

    from hf_paged.cli.main import app

    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert told in result.stderr


def test_connections_are_closed_by_hand(server: Running) -> None:
    start(server, SHORT).close()
    server.wait_until_empty()
